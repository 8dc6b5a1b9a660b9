"""A rendered pod's container without a container runtime: bubblewrap in place of the kubelet.

As in the pod: the root file system is read-only, only the volumes that the manifest mounts as
emptyDir can be written, config and secrets are where it puts them, the user is the manifest's,
without capabilities, and the network is the container's own. Not as in the pod: the image is this
machine's ``/usr`` and virtual environment, and there is no seccomp profile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil
import shipped
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR

VENV = Path(sys.executable).parent.parent
PYTHON_HOME = Path(sys.base_prefix)
IMAGE: Mapping[str, Path] = {
    "/usr": Path("/usr"),
    str(PYTHON_HOME): PYTHON_HOME,
    str(VENV): VENV,
    str(shipped.ROOT / "plugin"): shipped.ROOT / "plugin",
    "/opt/steerscope/catalog": CATALOG_DIR,
    "/opt/steerscope/demo-model": MODEL_DIR,
    **{f"/etc/{name}": Path("/etc", name) for name in ("passwd", "group", "hosts", "ld.so.cache")},
}


class Pod:
    """The container ``vllm`` of a Deployment, running."""

    def __init__(self, objects: list[shipped.Object], secrets: Path, log: IO[bytes]) -> None:
        self._spec = dict(shipped.pod_specs(objects))["steerscope-vllm"]
        (self._container,) = self._spec["containers"]
        self._config_maps = {
            o["metadata"]["name"]: o["data"] for o in shipped.of_kind(objects, "ConfigMap")
        }
        self._secrets = secrets
        read, write = os.pipe()
        command = ["bwrap", "--info-fd", str(write), *self._sandbox(), *self._user()]
        self.process = subprocess.Popen(
            [*command, *_entry_point(), *self._container["args"]],
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        with os.fdopen(read) as info:
            self._pid = json.load(info)["child-pid"]

    def inside(self, *command: str, timeout: float = 60) -> str:
        """What a command of this machine prints in the container's network."""
        done = subprocess.run(
            ["nsenter", "--net", f"--target={self._pid}", *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        first = psutil.Process(self._pid)
        return [first, *first.children(recursive=True)]

    def written(self) -> list[str]:
        """Files that are in the volumes."""
        root = Path(f"/proc/{self._pid}/root")
        volumes = (mount["mountPath"] for mount in self._writable())
        found = (path for volume in volumes for path in root.joinpath(volume[1:]).rglob("*"))
        return sorted(str(path)[len(str(root)) :] for path in found if not path.is_dir())

    def terminate(self) -> int:
        """Tell it to end as the kubelet does; its exit status, or TimeoutExpired."""
        psutil.Process(self._pid).terminate()
        return self.process.wait(self._spec["terminationGracePeriodSeconds"])

    def close(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _sandbox(self) -> Iterator[str]:
        yield from (
            "--unshare-net",
            "--unshare-pid",
            "--as-pid-1",
            "--die-with-parent",
            "--clearenv",
        )
        yield from ("--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys")
        for name in ("bin", "lib", "lib64", "sbin"):
            yield from ("--symlink", f"usr/{name}", f"/{name}")
        # Volumes first: the checkout may lie in the folder that one of them takes the place of.
        volumes = self._container["volumeMounts"]
        yield from _parents(mount["mountPath"] for mount in volumes)
        for mount in volumes:
            yield from self._mounted(mount)
        yield from _parents(IMAGE)
        for place, source in IMAGE.items():
            yield from ("--ro-bind", str(source), place)
        yield from ("--chdir", "/home/vllm", "--remount-ro", "/")
        yield from ("--setenv", "PATH", f"{VENV / 'bin'}:/usr/bin:/bin")
        for variable in self._container["env"]:
            yield from ("--setenv", variable["name"], variable["value"])

    def _mounted(self, mount: Mapping[str, Any]) -> Iterator[str]:
        volume = self._volume(mount)
        if "emptyDir" in volume:
            yield from ("--perms", "0777", "--tmpfs", mount["mountPath"])
            return
        yield from ("--ro-bind", str(self._source(volume, mount)), mount["mountPath"])

    def _source(self, volume: Mapping[str, Any], mount: Mapping[str, Any]) -> Path:
        if "secret" in volume:
            return self._secrets / volume["secret"]["secretName"].removeprefix("steerscope-")
        written = self._secrets.parent / mount["subPath"]
        written.write_text(self._config_maps[volume["configMap"]["name"]][mount["subPath"]])
        return written

    def _volume(self, mount: Mapping[str, Any]) -> Mapping[str, Any]:
        (found,) = [v for v in self._spec["volumes"] if v["name"] == mount["name"]]
        return found

    def _writable(self) -> Iterator[Mapping[str, Any]]:
        mounts = self._container["volumeMounts"]
        return (mount for mount in mounts if "emptyDir" in self._volume(mount))

    def _user(self) -> list[str]:
        context = self._spec["securityContext"]
        user = [f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}"]
        without = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        return ["setpriv", *user, *without]


def _parents(places: Iterable[str]) -> Iterator[str]:
    """Folders that everyone may pass through; what bwrap makes itself is root's alone."""
    for parent in sorted({str(up) for place in places for up in Path(place).parents[:-1]}):
        yield from ("--perms", "0755", "--dir", parent)


def _entry_point() -> list[str]:
    """What the image of the CPU runs."""
    text = (shipped.DEPLOY / "Containerfile.cpu").read_text()
    (line,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    command: list[str] = json.loads(line)
    return command
