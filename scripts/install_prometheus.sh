#!/usr/bin/env bash
# Install Prometheus and Alertmanager, with promtool and amtool, from Debian's packages: for
# tests/dashboards. Needs root and apt-get. Does nothing when they are there.
#
# The packages' services are not started (or are stopped): the tests run their own processes.
set -euo pipefail

tools=(prometheus promtool prometheus-alertmanager amtool)
are_there() {
  local tool
  for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || return 1; done
}

are_there && exit 0
command -v apt-get >/dev/null || { echo "install_prometheus: there is no apt-get" >&2; exit 1; }
[[ $(id -u) -eq 0 ]] || { echo "install_prometheus: needs root" >&2; exit 1; }

export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get -qq update
apt-get -qq install -y --no-install-recommends prometheus prometheus-alertmanager >/dev/null
for service in prometheus prometheus-alertmanager; do
  if command -v systemctl >/dev/null && [[ -d /run/systemd/system ]]; then
    systemctl disable --now "$service" >/dev/null 2>&1 || true
  fi
done
are_there || { echo "install_prometheus: ${tools[*]}: not all of them are there" >&2; exit 1; }
