#!/usr/bin/env bash
# Make what a hub beyond loopback needs: an authority of its own, the hub's certificate, one
# identity that may do everything, and what Redis takes. For a trial; in production let your
# authority sign, and give every team an identity of its own (docs/security.md).
#
#   deploy/credentials.sh FOLDER [NAME…]      NAME: what clients call the hub, in its certificate
#
#   FOLDER/ca.crt, ca.key           the authority
#   FOLDER/admin.token              the bearer token; the hub only ever sees its hash
#   FOLDER/tls/                     tls.crt, tls.key, ca.crt: for the hub
#   FOLDER/identities/              identities.yaml: for the hub
#   FOLDER/redis-tls/               tls.crt, tls.key, ca.crt: for Redis
#   FOLDER/redis/                   password, users.acl: for Redis
#
# FOLDER is for its owner only; what is in it can be read, since containers mount its parts under
# another user id.
set -euo pipefail

STEERSCOPE=${STEERSCOPE:-steerscope}
DAYS=${DAYS:-90}

command -v "${STEERSCOPE%% *}" >/dev/null ||
  { echo "credentials: there is no $STEERSCOPE; name one in STEERSCOPE" >&2; exit 1; }
folder=${1:?usage: credentials.sh FOLDER [NAME…]}
shift
names=("$@" steerscope-hub localhost)
[[ ! -e $folder ]] || { echo "credentials: $folder is there already" >&2; exit 1; }

mkdir -m 0700 -p "$folder"
cd "$folder"
umask 022
mkdir tls identities redis redis-tls

authority() {
  (umask 077; openssl ecparam -name prime256v1 -genkey -noout -out ca.key)
  openssl req -x509 -new -key ca.key -subj "/CN=Steerscope trial authority" -days "$DAYS" -out ca.crt
}

certificate() { # FOLDER NAME…: a key, and a certificate of the authority for these names
  local to=$1 cn=$2 alternatives
  alternatives=$(printf ',DNS:%s' "${@:2}")
  openssl ecparam -name prime256v1 -genkey -noout -out "$to/tls.key"
  chmod 0644 "$to/tls.key"
  openssl req -new -key "$to/tls.key" -subj "/CN=$cn" |
    openssl x509 -req -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -days "$DAYS" \
      -extfile <(printf 'subjectAltName=%s,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n' "${alternatives:1}") \
      -out "$to/tls.crt" 2>/dev/null
  cp ca.crt "$to/ca.crt"
}

identity() {
  local made
  made=$($STEERSCOPE token new)
  (umask 077; awk '/^token:/ {print $2}' <<<"$made" >admin.token)
  cat >identities/identities.yaml <<YAML
identities:
  - name: admin
    scopes: [admin]
    token_sha256: $(awk '/^token_sha256:/ {print $2}' <<<"$made")
YAML
}

redis() { # one user, who may only touch the hubs' keys and channel
  local password
  password=$(openssl rand -hex 32)
  printf '%s' "$password" >redis/password
  cat >redis/users.acl <<ACL
user default off
user steerscope on #$(printf '%s' "$password" | sha256sum | cut -d' ' -f1) ~steerscope* &steerscope* +@all -@admin -@dangerous
ACL
}

authority
certificate tls "${names[@]}"
certificate redis-tls steerscope-redis
identity
redis
echo "credentials: in $folder, for ${names[*]}, for $DAYS days" >&2
