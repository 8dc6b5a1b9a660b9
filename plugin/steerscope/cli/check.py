"""``steerscope check``: everything that can be known to be wrong before a server starts."""

from __future__ import annotations

from pathlib import Path

from steerscope.catalog import fingerprint, store
from steerscope.catalog.modelfolder import ModelFolder
from steerscope.catalog.store import Catalog
from steerscope.config import Settings
from steerscope.export import budget
from steerscope.hub.auth.gate import guard
from steerscope.steering.policies import check_declared


def run(settings: Settings, model: Path | None) -> int:
    """Print a summary; raise the first thing that is wrong."""
    catalog = store.load(Path(settings.catalog), settings.catalog_digest)
    check_declared(catalog, settings)
    budget.check(catalog, settings)
    if model is not None:
        found = fingerprint.check(
            catalog.document.model, ModelFolder.read(model).as_served(), settings.allow_fine_tune
        )
        print(f"model     {found.match}  {'; '.join(found.differences)}".rstrip())
    document = catalog.document
    print(f"catalog   {document.name} {document.version}  {catalog.digest}")
    for key, features in catalog.sites.items():
        print(f"  {key}  {', '.join(feature.name for feature in features)}")
    print(f"signals   {', '.join(signal.name for signal in catalog.signals) or '-'}")
    named = [p.name for p in (*catalog.policies, *settings.policies)]
    print(f"policies  {', '.join(named) or '-'}")
    guarded = guard(settings.security, settings.addresses)
    names = [identity.name for identity in guarded.gate.directory.identities]
    print(f"security  {'TLS' if guarded.certificates else 'no TLS'}; {', '.join(names) or '-'}")
    print(f"hub       gRPC {settings.hub.grpc_address}, HTTP {settings.hub.http_address}")
    print(f"series    {_series(catalog, settings)}")
    return 0


def _series(catalog: Catalog, settings: Settings) -> str:
    declared, most = budget.declared(catalog, settings), budget.most(catalog, settings)
    limit = settings.telemetry.max_series_per_engine
    of_engine = f"{declared.of_engine} an engine, at most {most.of_engine} (limit {limit})"
    return f"{of_engine}; {declared.of_hub} of the hub, at most {most.of_hub}"
