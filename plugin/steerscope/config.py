"""Settings: one YAML tree, frozen once read. The only module that reads the environment.

The file named by ``STEERSCOPE_CONFIG``, or the same tree under
``--additional-config '{"steerscope": {...}}'``:

    catalog: path/to/catalog        # relative to the file
    policies: []                    # beside those the catalog ships
    rules: {}                       # which of them govern requests that ask for nothing, or others
    hub:
      grpc_address: 127.0.0.1:50051
      http_address: 127.0.0.1:9464
    security: {}                    # who may do what; see security.py
    state: {sqlite: state.db}       # or redis; relative to the file; absent: this launch only
    otel: {endpoint: "http://127.0.0.1:4317"}   # a collector to send to; absent: none
    canary: {base_url: "http://127.0.0.1:8000", checks: {...}}   # absent: none
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from steerscope import security as access
from steerscope.catalog.model import LabelSlug, ModelMatch, Slug
from steerscope.errors import ConfigError, HubError
from steerscope.steering.interventions import MAX_INTERVENTIONS, Policy
from steerscope.steering.rules import HeaderName, Rules

CONFIG_ENV = "STEERSCOPE_CONFIG"
HUB_ENDPOINT_ENV = "STEERSCOPE_HUB_ENDPOINT"
"""Set by the launcher for its children: the folder of the running hub's sockets."""

ADDRESS_ENV = "STEERSCOPE_ADDRESS"
TOKEN_ENV = "STEERSCOPE_TOKEN"
"""For the command line only: the hub to talk to, and the token to show it."""

ADDITIONAL_CONFIG_KEY = "steerscope"

_HEADER = re.compile(r"[A-Za-z0-9._-]{1,128}=[\x20-\x7e]{1,8192}")

Address = Annotated[str, msgspec.Meta(pattern=r"^.+:\d{1,5}\Z")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
_Prompt = Annotated[str, msgspec.Meta(min_length=1, max_length=10_000)]
_ResourceKey = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_.]{0,127}$")]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class HubSettings(_Settings, frozen=True):
    """The hub process. Ports bind to loopback unless told otherwise; 0 picks a free one."""

    grpc_address: Address = "127.0.0.1:50051"
    http_address: Address = "127.0.0.1:9464"
    max_policies: Positive = 1000
    max_reports: Positive = 10_000
    report_ttl_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 600.0
    max_tokens_per_report: Positive = 4096
    max_report_bytes: Positive = 48 << 20
    max_frame_wait_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 10.0


class SteeringSettings(_Settings, frozen=True):
    """Limits on what one request may ask."""

    max_interventions: Annotated[int, msgspec.Meta(ge=1, le=MAX_INTERVENTIONS)] = MAX_INTERVENTIONS
    max_rows_per_request: Positive = 4
    max_dose: access.Above0 | None = None
    """No steering may ask for more; holds for all that names no ``max_dose`` of its own."""
    match_headers: tuple[HeaderName, ...] = ()
    """HTTP headers, in lower case, that rules may match; front ends look at no others."""
    require_identity: bool = False
    """Whether only HTTP requests that bear the token of an identity with the scope steer may ask
    for steering. Rules, which an operator makes, hold for everyone."""
    allow_inline: bool | None = None
    """Whether requests may bring edits instead of a policy's name. Once loaded it is set: absent
    it is true while no identity is configured and the hub is on loopback, else false."""


class TelemetrySettings(_Settings, frozen=True):
    """What the workers keep and tell."""

    max_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    """Host memory per worker for activations beside the KV cache; see ``engine/slots.py``."""
    drift_window_seconds: Annotated[float, msgspec.Meta(ge=10, le=604_800)] = 900.0
    """Drift is measured over the newest so many seconds."""
    max_series_per_engine: Positive = 20_000
    """A launch that might tell Prometheus more of one engine is refused; ``export/budget.py``."""


def _plain_url(field: str, url: str, secret: str) -> SplitResult:
    """A web address without secrets in it; ``secret`` says which setting names theirs."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{field}: must be a URL that begins with http:// or https://")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"{field}: must be a scheme, a host, a port and a path only, since vLLM logs these "
            f"settings: name the variable that holds {secret}"
        )
    return parts


class CanaryCheck(_Settings, frozen=True):
    """Questions whose answers are known to light up certain signals."""

    prompts: Annotated[tuple[_Prompt, ...], msgspec.Meta(min_length=1)]
    """Asked in turn, one each time."""
    expect: Annotated[dict[Slug, LabelSlug], msgspec.Meta(min_length=1)]
    """The label that each of these signals must have."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16


class CanarySettings(_Settings, frozen=True):
    """Synthetic requests on a timer, which prove that signals still tell what they should.

    The hub asks the server it belongs to, as a client does. These requests are counted apart:
    they are in no metric of features or signals.
    """

    base_url: str
    """Of the server, without ``/v1``."""
    checks: Annotated[dict[Slug, CanaryCheck], msgspec.Meta(min_length=1, max_length=32)]
    model: str = ""
    """Empty for the served one."""
    api: Literal["chat", "completions"] = "chat"
    api_key_env: str | None = None
    """Names the environment variable, of the launcher, that holds the server's API key."""
    ca_file: str | None = None
    """Whom an ``https`` server must be vouched for by; the system's by default. Absolute once
    loaded."""
    interval_seconds: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 60.0
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 30.0
    """For the answer, and again for what was seen of it."""

    def __post_init__(self) -> None:
        parts = _plain_url("base_url", self.base_url, "a key in api_key_env")
        is_near = access.is_loopback(f"{parts.hostname}:{parts.port or 80}")
        if parts.scheme == "http" and self.api_key_env is not None and not is_near:
            raise ValueError("base_url: is not encrypted, and the API key would travel: use https")
        if parts.scheme == "http" and self.ca_file is not None:
            raise ValueError("ca_file: contradicts base_url, which is http")


class RedisSettings(_Settings, frozen=True):
    """A Redis that the hubs of a fleet share."""

    url: Annotated[str, msgspec.Meta(pattern=r"^rediss?://")]
    """Without a password: these settings travel to every process, and vLLM logs them."""
    prefix: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._/-]{1,64}\Z")] = "steerscope"
    """Of all keys: one per deployment."""
    password_env: str | None = None
    """Names the environment variable, of the launcher, that holds the password."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError(
                "url: must not hold a password, since vLLM logs these settings: "
                "name the variable that holds it in password_env"
            )


class StateSettings(_Settings, frozen=True):
    """Where created policies and rules are kept.

    In the one place named, or else in the endpoint folder: there they outlive the hub, but not
    the launch.
    """

    sqlite: str | None = None
    """A file, for one hub. Absolute once loaded."""
    redis: RedisSettings | None = None

    def __post_init__(self) -> None:
        if self.sqlite is not None and self.redis is not None:
            raise ValueError("sqlite and redis cannot both be given")


class AuditSettings(_Settings, frozen=True):
    """The audit log; without a path there is none. See ``hub/audit/log.py``."""

    path: str | None = None
    """Absolute once loaded; its folder must exist."""
    max_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 64 << 20
    keep: Positive | None = None
    """How many rotated files are kept; absent deletes nothing."""
    fsync: Literal["every", "changes", "never"] = "changes"
    on_error: Literal["refuse", "continue"] = "refuse"
    """Whether steering may change while it cannot be recorded."""
    key_file: str | None = None
    """Adds an HMAC to each line. Absolute once loaded."""


class OtelSettings(_Settings, frozen=True):
    """An OpenTelemetry collector, which gets all metrics, and each score as an event."""

    endpoint: str
    """A URL; over ``http`` the base of what the collector serves under ``/v1``."""
    protocol: Literal["grpc", "http"] = "grpc"
    headers_env: str | None = None
    """Names the environment variable, of the launcher, that holds headers to send along, as
    OpenTelemetry writes them: ``name=value,name=value``, the values percent-encoded."""
    insecure: bool = False
    """Allows an endpoint beyond loopback that is not encrypted."""
    ca_file: str | None = None
    """Whom an ``https`` endpoint must be vouched for by; the system's by default. Absolute once
    loaded."""
    interval_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 60.0
    """Between two collections of metrics. Events leave within a second."""
    resource: dict[_ResourceKey, str] = {}
    """Attributes beside, or instead of, those that say what this hub is."""
    model_name: str = ""
    """vLLM's served name. The launcher fills it in."""

    def __post_init__(self) -> None:
        parts = _plain_url("endpoint", self.endpoint, "a secret in headers_env")
        if self.protocol == "grpc" and parts.path not in ("", "/"):
            raise ValueError("endpoint: gRPC has no path")
        if parts.scheme == "https":
            if self.insecure:
                raise ValueError("insecure: contradicts the endpoint, which is https")
            return
        if not self.insecure and not access.is_loopback(f"{parts.hostname}:{parts.port}"):
            raise ValueError("endpoint: is not encrypted: use https, or set insecure")
        if self.ca_file is not None:
            raise ValueError("ca_file: contradicts the endpoint, which is http")


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
    rules: Rules = Rules()
    """In force until ``UpdateRules`` is called for the first time."""
    hub: HubSettings = HubSettings()
    steering: SteeringSettings = SteeringSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    state: StateSettings = StateSettings()
    audit: AuditSettings = AuditSettings()
    security: access.Security = access.Security()
    otel: OtelSettings | None = None
    canary: CanarySettings | None = None

    @property
    def addresses(self) -> dict[str, str]:
        """Where the hub listens, by setting."""
        fields = ("grpc_address", "http_address")
        return {f"hub.{field}": getattr(self.hub, field) for field in fields}


def load_file(path: Path) -> Settings:
    """Read a config file; raise ``ConfigError`` naming the file and the field."""
    from steerscope import yamltext  # for those who have a file: vLLM imports us in every process

    try:
        tree = yamltext.read(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return from_tree(tree, base=path.absolute().parent, where=str(path))


def from_tree(tree: Any, *, base: Path, where: str) -> Settings:
    """Convert a parsed tree; relative paths are taken from ``base``."""
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    catalog = _folder(base / settings.catalog, f"{where}: catalog")
    state = settings.state
    if state.sqlite is not None:
        state = msgspec.structs.replace(state, sqlite=str((base / state.sqlite).absolute()))
    files = {
        field: str((base / path).absolute())
        for field in ("path", "key_file")
        if (path := getattr(settings.audit, field)) is not None
    }
    audit = msgspec.structs.replace(settings.audit, **files)
    otel = settings.otel
    if otel is not None and otel.ca_file is not None:
        otel = msgspec.structs.replace(otel, ca_file=str((base / otel.ca_file).absolute()))
    canary = settings.canary
    if canary is not None and canary.ca_file is not None:
        canary = msgspec.structs.replace(canary, ca_file=str((base / canary.ca_file).absolute()))
    settings = msgspec.structs.replace(
        settings, catalog=str(catalog), state=state, audit=audit, otel=otel, canary=canary
    )
    return _secured(settings, base, where)


def _folder(path: Path, where: str) -> Path:
    try:
        found = path.resolve(strict=True)
        is_folder = found.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, a loop of links
        is_folder = False
    if not is_folder:
        raise ConfigError(f"{where}: no folder {str(path)!r}")
    return found


def _secured(settings: Settings, base: Path, where: str) -> Settings:
    """The settings with ``security`` checked and what follows from it filled in."""
    security = access.resolved(settings.security, base)
    try:
        access.check(security, settings.addresses)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    steering = settings.steering
    if steering.allow_inline is None:
        private = access.is_private(security, settings.addresses.values())
        steering = msgspec.structs.replace(steering, allow_inline=private)
    return msgspec.structs.replace(settings, security=security, steering=steering)


_BESIDE_THE_GRAPH = {
    *("catalog", "allow_fine_tune", "model_match", "policies", "rules", "hub", "state"),
    *("audit", "security", "otel", "canary"),
}
"""Of the settings, what can change without another compilation. Of the catalog's path only the
digest counts."""


def to_tree(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON-able data, for ``VllmConfig.additional_config``."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    return tree


def names_us(additional_config: Any) -> bool:
    """Whether vLLM's ``additional_config`` holds settings of ours."""
    return isinstance(additional_config, Mapping) and ADDITIONAL_CONFIG_KEY in additional_config


def of_graph(additional_config: Any) -> Any | None:
    """``additional_config`` without what no compiled graph depends on; None when not configured."""
    if not names_us(additional_config):
        return None
    tree = additional_config[ADDITIONAL_CONFIG_KEY]
    kept = {key: value for key, value in tree.items() if key not in _BESIDE_THE_GRAPH}
    return {**additional_config, ADDITIONAL_CONFIG_KEY: kept}


def discover(additional_config: Any, environ: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings in force, or None when Steerscope is not configured at all."""
    if names_us(additional_config):
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


def named(settings: Settings, model_name: str) -> Settings:
    """The settings, with the name under which the launcher found the model served."""
    if settings.otel is None:
        return settings
    otel = msgspec.structs.replace(settings.otel, model_name=model_name)
    return msgspec.structs.replace(settings, otel=otel)


def otel_headers(settings: OtelSettings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The headers in the variable that the settings name; ``ConfigError`` if they are none."""
    if settings.headers_env is None:
        return {}
    if settings.headers_env not in environ:
        raise ConfigError(f"otel.headers_env: {settings.headers_env} is not set")
    headers = {}
    for pair in environ[settings.headers_env].split(","):
        name, separator, value = (part.strip() for part in pair.partition("="))
        headers[name.lower()] = unquote(value)
        if not separator or not _HEADER.fullmatch(f"{name}={unquote(value)}"):
            raise ConfigError(f"otel.headers_env: {settings.headers_env} is not name=value,...")
    return headers


def canary_key(settings: CanarySettings, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key in the variable that the settings name; ``ConfigError`` if it is not set."""
    if settings.api_key_env is None:
        return None
    if not environ.get(settings.api_key_env):
        raise ConfigError(f"canary.api_key_env: {settings.api_key_env} is not set")
    return environ[settings.api_key_env]


def redis_password(settings: RedisSettings, environ: Mapping[str, str] = os.environ) -> str | None:
    """The password in the variable that the settings name; ``ConfigError`` if it is not set."""
    if settings.password_env is None:
        return None
    if settings.password_env not in environ:
        raise ConfigError(f"state.redis.password_env: {settings.password_env} is not set")
    return environ[settings.password_env]


def client_environment(environ: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """The hub's address and a token, for commands that are not told them otherwise."""
    return environ.get(ADDRESS_ENV) or None, environ.get(TOKEN_ENV) or None


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where what is made once for a machine is kept."""
    root = environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "steerscope"


def compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """The C++ compiler, which the user may name as builds have it; None where there is none."""
    for name in (environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def is_configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process, or the launcher it descends from, was given settings."""
    return bool(environ.get(CONFIG_ENV) or environ.get(HUB_ENDPOINT_ENV))


def has_core_in_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether vLLM's ``LLM`` would run its engine core in this very process."""
    return environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


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
