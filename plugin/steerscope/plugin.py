"""Composition root: what Steerscope does at each seam into vLLM (listed in engine/seams.py).

    launch          (launcher)        settings → additional_config; checks; starts the hub
    front_end       (API server, LLM) admission wired to the hub
    scheduler_side  (engine core)     what workers must know beside the scheduler's output
    runtime         (worker)          taps in the model, plan, readout

``register`` is vLLM's general-plugin entry point. It runs in every process, more
than once, before anything is configured; unconfigured, it returns at once and
nothing of vLLM is patched. ``endpoints`` is its endpoint-plugin entry point, which vLLM
calls in API servers only, and only where VLLM_PLUGINS names us.
"""

from __future__ import annotations

import gc
import inspect
import logging
from typing import TYPE_CHECKING, Any

from steerscope import config

if TYPE_CHECKING:
    from steerscope.catalog.store import Catalog
    from steerscope.engine.orders import Stamps
    from steerscope.engine.runtime import EngineRuntime
    from steerscope.engine.scheduling import SchedulerSide
    from steerscope.hub.supervision import RunningHub
    from steerscope.steering.frontend import FrontEnd
    from steerscope.steering.report_route import ReportRoute

_log = logging.getLogger(__name__)
_instances = 0
_hub: RunningHub | None = None


def register() -> None:
    """Entry point ``vllm.general_plugins: steerscope``."""
    if not (config.is_configured() or _configured_by_argument()):
        return
    import multiprocessing

    from steerscope.engine import seams

    seams.install(
        seams.Callbacks(launch, config.of_graph, launched, front_end, scheduler_side, runtime)
    )
    if multiprocessing.parent_process() is not None:
        # vLLM's own process. It does the same once it is up; till then, each time that the
        # collector goes through all that was imported takes .4 s of the start.
        gc.freeze()


def endpoints() -> ReportRoute:
    """Entry point ``vllm.endpoint_plugins: steerscope``; unconfigured, it has no route."""
    from steerscope.steering.report_route import ReportRoute

    return ReportRoute(config.is_configured(), _front_end_of)


def launch(additional_config: Any) -> Any | None:
    """Settle the settings and pin the catalog they name; None when not configured."""
    settings = config.discover(additional_config)
    if settings is None:
        return None
    from steerscope.export import budget
    from steerscope.steering.policies import check_declared

    catalog = load_catalog(settings)
    check_declared(catalog, settings)
    budget.check(catalog, settings)
    settings = config.pinned(settings, catalog.digest)
    return {**additional_config, config.ADDITIONAL_CONFIG_KEY: config.to_tree(settings)}


def launched(vllm_config: Any) -> None:
    """Refuse what cannot be served exactly, then see to it that a hub runs."""
    from steerscope.catalog import fingerprint
    from steerscope.engine import seams

    settings = _settings(vllm_config)
    assert settings is not None
    seams.check_version()
    seams.check_engine(vllm_config)
    found = fingerprint.check(
        load_catalog(settings).document.model,
        seams.served_model(vllm_config),
        settings.allow_fine_tune,
    )
    if found.differences:
        _log.warning("served as a fine-tune of the catalog's model: %s", found.differences)
    if found.unchecked:
        _log.warning("not compared, the model is not on local disk: %s", found.unchecked)
    settings = config.matched(settings, found.match)
    settings = config.named(settings, seams.served_name(vllm_config))
    vllm_config.additional_config[config.ADDITIONAL_CONFIG_KEY] = config.to_tree(settings)
    _ensure_hub(settings)
    if seams.is_on_cpu(vllm_config):
        from steerscope.engine import native

        native.start()  # workers will look for it when their model is loaded


def front_end(vllm_config: Any) -> FrontEnd | None:
    """The front end's half, linked to the hub."""
    settings = _settings(vllm_config)
    if settings is None:
        return None
    from steerscope.engine import seams
    from steerscope.hub.link import FrontendLink
    from steerscope.steering.frontend import FrontEnd

    catalog = load_catalog(settings)
    link = FrontendLink(config.require_hub_endpoint(), catalog.digest)
    link.start()
    return FrontEnd(catalog, settings, link, seams.served_name(vllm_config), _refused(vllm_config))


def _front_end_of(engine_client: Any) -> FrontEnd | None:
    from steerscope.engine import seams

    return seams.front_end_of(engine_client)


def scheduler_side(vllm_config: Any, stamps: Stamps) -> SchedulerSide | None:
    """The scheduler's half, open to the hub's orders."""
    settings = _settings(vllm_config)
    if settings is None:
        return None
    from steerscope.engine import seams
    from steerscope.engine.orders import EngineLink, Limits, OrderBook
    from steerscope.engine.scheduling import SchedulerSide

    assert settings.catalog_digest is not None
    engine = str(vllm_config.parallel_config.data_parallel_index)
    link = EngineLink(config.require_hub_endpoint(), engine, settings.catalog_digest, stamps)
    limits = Limits(
        settings.catalog_digest, settings.steering.max_rows_per_request, _refused(vllm_config)
    )
    book = OrderBook(link.arrived, link.answer, limits, stamps)
    return SchedulerSide(seams.is_speculative(vllm_config), book)


def _refused(vllm_config: Any) -> str:
    """Why nothing may be steered in this engine; empty where it may."""
    from steerscope.engine import seams

    # A connector's store is keyed by tokens: steered KV would be served to the unsteered.
    refused = "nothing is steered with --kv-transfer-config, only observed"
    return refused if seams.has_external_kv(vllm_config) else ""


def runtime(vllm_config: Any, model_runner: Any) -> EngineRuntime | None:
    """The worker's half, with its taps in the model."""
    settings = _settings(vllm_config)
    if settings is None:
        return None
    from steerscope.engine import seams, tape
    from steerscope.engine.readout import Source
    from steerscope.engine.runtime import EngineRuntime
    from steerscope.engine.sender import FrameSender

    seams.verify(loaded_only=True)
    global _instances
    instance, _instances = _instances, _instances + 1
    catalog = load_catalog(settings)
    parallel = vllm_config.parallel_config
    source = Source(
        catalog_digest=catalog.digest,
        model_name=seams.served_name(vllm_config),
        engine=str(parallel.data_parallel_index),
        rank=parallel.rank,
    )
    reports = seams.is_first_tensor_rank()
    capacity = seams.capacity(
        vllm_config,
        model_runner,
        settings.steering.max_rows_per_request,
        settings.telemetry.max_cache_bytes,
    )
    num_features = sum(map(len, catalog.sites.values()))
    most = tape.max_frame_bytes(num_features, len(catalog.sites), capacity.max_num_tokens)
    made = EngineRuntime(
        catalog,
        seams.decoder_layers(model_runner.get_model(), catalog.document.model.num_hidden_layers),
        capacity,
        model_runner.device,
        source,
        FrameSender(config.require_hub_endpoint(), most) if reports else None,
        lambda: seams.kv_geometry(model_runner),
        seams.is_speculative(vllm_config),
        instance,
    )
    made.announce()
    return made


def load_catalog(settings: config.Settings) -> Catalog:
    """The catalog the settings name; refused if it is not the one they pin."""
    from pathlib import Path

    from steerscope.catalog import store

    return store.load(Path(settings.catalog), settings.catalog_digest)


def _configured_by_argument() -> bool:
    """Whether the ``EngineArgs`` now being built, whose ``__post_init__`` loads us, name us.

    Looking is how ``--additional-config`` is noticed without patching an unconfigured vLLM.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__post_init__":
            given = getattr(frame.f_locals.get("self"), "additional_config", None)
            if config.names_us(given):
                return True
        frame = frame.f_back
    return False


def _settings(vllm_config: Any) -> config.Settings | None:
    """Past the launcher only ``additional_config`` counts, never the environment."""
    return config.discover(vllm_config.additional_config, environ={})


def _ensure_hub(settings: config.Settings) -> None:
    """Start a hub unless this launch has one already."""
    global _hub
    from steerscope.hub import launcher

    if _hub is not None and not _hub.is_stopped:
        return
    if _hub is None and config.hub_endpoint() is not None:
        return
    _hub = launcher.start_hub(settings)
    config.publish_hub_endpoint(_hub.endpoint)
