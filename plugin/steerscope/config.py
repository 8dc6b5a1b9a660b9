"""Settings: one YAML tree, frozen once read. The only module that reads the environment.

The file named by ``STEERSCOPE_CONFIG``, or the same tree under
``--additional-config '{"steerscope": {...}}'``:

    catalog: path/to/catalog        # relative to the file
    policies: []                    # beside those the catalog ships
    hub:
      grpc_address: 127.0.0.1:50051
      http_address: 127.0.0.1:9464
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from steerscope.catalog.model import ModelMatch
from steerscope.errors import ConfigError, HubError
from steerscope.steering.interventions import MAX_INTERVENTIONS, Policy

CONFIG_ENV = "STEERSCOPE_CONFIG"
HUB_ENDPOINT_ENV = "STEERSCOPE_HUB_ENDPOINT"
"""Set by the launcher for its children: the folder of the running hub's sockets."""

ADDITIONAL_CONFIG_KEY = "steerscope"

Address = Annotated[str, msgspec.Meta(pattern=r"^.+:\d{1,5}$")]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class HubSettings(_Settings, frozen=True):
    """The hub process. Ports bind to loopback unless told otherwise; 0 picks a free one."""

    grpc_address: Address = "127.0.0.1:50051"
    http_address: Address = "127.0.0.1:9464"
    max_policies: Positive = 1000
    max_reports: Positive = 10_000
    report_ttl_seconds: float = 600.0
    max_tokens_per_report: Positive = 4096


class SteeringSettings(_Settings, frozen=True):
    """Limits on what one request may ask."""

    max_interventions: Annotated[int, msgspec.Meta(ge=1, le=MAX_INTERVENTIONS)] = MAX_INTERVENTIONS
    max_rows_per_request: Positive = 4
    max_dose: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """No steering may ask for more; holds for all that names no ``max_dose`` of its own."""


class TelemetrySettings(_Settings, frozen=True):
    """What the workers keep and tell."""

    max_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    """Host memory per worker for activations beside the KV cache; see ``engine/slots.py``."""


class Settings(_Settings, frozen=True):
    """The whole tree. ``catalog`` is absolute once loaded."""

    catalog: str
    catalog_digest: str | None = None
    """Pins the catalog: another one in the folder is refused. The launcher fills it in."""
    allow_fine_tune: bool = False
    """Serve a model of the catalog's geometry whose weights or tokenizer differ, and say so."""
    model_match: ModelMatch = ModelMatch.EXACT
    """How the served model compares with the catalog's. The launcher fills it in."""
    policies: tuple[Policy, ...] = ()
    hub: HubSettings = HubSettings()
    steering: SteeringSettings = SteeringSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


def load_file(path: Path) -> Settings:
    """Read a config file; raise ``ConfigError`` naming the file and the field."""
    try:
        tree = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return from_tree(tree, base=path.resolve().parent, where=str(path))


def from_tree(tree: Any, *, base: Path, where: str) -> Settings:
    """Convert a parsed tree; relative paths are taken from ``base``."""
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    catalog = (base / settings.catalog).resolve()
    if not catalog.is_dir():
        raise ConfigError(f"{where}: catalog: no folder {catalog}")
    return msgspec.structs.replace(settings, catalog=str(catalog))


def to_tree(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON-able data, for ``VllmConfig.additional_config``."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    return tree


def discover(additional_config: Any, environ: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings in force, or None when Steerscope is not configured at all."""
    if isinstance(additional_config, Mapping) and ADDITIONAL_CONFIG_KEY in additional_config:
        return from_tree(
            additional_config[ADDITIONAL_CONFIG_KEY],
            base=Path.cwd(),
            where=f"additional_config.{ADDITIONAL_CONFIG_KEY}",
        )
    path = environ.get(CONFIG_ENV)
    return load_file(Path(path)) if path else None


def pinned(settings: Settings, digest: str) -> Settings:
    """The settings, bound to the catalog of that digest."""
    return msgspec.structs.replace(settings, catalog_digest=digest)


def matched(settings: Settings, match: ModelMatch) -> Settings:
    """The settings, with what the launcher found the model to be."""
    return msgspec.structs.replace(settings, model_match=match)


def is_configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process, or the launcher it descends from, was given settings."""
    return bool(environ.get(CONFIG_ENV) or environ.get(HUB_ENDPOINT_ENV))


def hub_endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """The folder of the hub's sockets, where a launcher has started one."""
    return environ.get(HUB_ENDPOINT_ENV)


def require_hub_endpoint() -> str:
    """The hub's folder; raise ``HubError`` in a process that no launcher started."""
    endpoint = hub_endpoint()
    if endpoint is None:
        raise HubError(f"no hub: {HUB_ENDPOINT_ENV} is not set in this process")
    return endpoint


def publish_hub_endpoint(folder: str) -> None:
    """Tell the processes this one will start where the hub listens."""
    os.environ[HUB_ENDPOINT_ENV] = folder


def withdraw_hub_endpoint() -> None:
    """The hub is gone; processes started from now on get one of their own."""
    os.environ.pop(HUB_ENDPOINT_ENV, None)
