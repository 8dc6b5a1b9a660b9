"""Where in a model the sites are: which module's input or output each one is.

Decoder layers are found as the one list of the model's depth. ``resid_pre`` and
``resid_post`` are any layer's input and output; the sites inside a layer are known by
the names of its norms, of which there are few (``NORMS``), and refused elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from steerscope.catalog.model import Site
from steerscope.errors import UnsupportedEngineError

Visit = Callable[[Tensor, Tensor | None], None]
"""Called with (hidden, residual or None), which it may edit in place; x is their sum."""


class Norms(NamedTuple):
    """How a family of decoder layers names its norms, in the order of the forward pass."""

    names: tuple[str, ...]
    before_mlp: str
    after_attention: str | None = None
    """The norm on what attention adds, where there is one."""
    after_mlp: str | None = None


NORMS = (
    Norms(("input_layernorm", "post_attention_layernorm"), "post_attention_layernorm"),
    Norms(("ln_1", "ln_2"), "ln_2"),
    Norms(
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        "pre_feedforward_layernorm",
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
)
ATTENTION = ("self_attn", "attn")
MLP = ("mlp", "block_sparse_moe")
MULTIPLIERS = ("residual_multiplier", "scale_depth", "residual_scale")
"""Layers with one of these scale what they add to the stream: not what we would read."""


def decoder_layers(
    model: nn.Module, num_hidden_layers: int, missing: type[nn.Module]
) -> dict[int, nn.Module]:
    """The decoder layers this rank holds by index; ``missing`` stands for those it does not."""
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
    return {i: layer for i, layer in enumerate(stacks[0]) if not isinstance(layer, missing)}


def attach(layer: nn.Module, site: Site, visit: Visit) -> None:
    """Have ``visit`` called at the site; raise ``UnsupportedEngineError`` if there is none."""
    match site:
        case Site.RESID_PRE:
            _before(layer, visit)
        case Site.RESID_POST:
            _after(layer, visit)
        case Site.RESID_MID:
            _before(_child(layer, site, (_norms(layer, site).before_mlp,)), visit)
        case Site.MLP_IN:
            _before(_child(layer, site, MLP), visit)
        case Site.ATTN_OUT:
            norm = _norms(layer, site).after_attention
            _after(_child(layer, site, (norm,) if norm else ATTENTION), visit)
        case Site.MLP_OUT:
            norm = _norms(layer, site).after_mlp
            _after(_child(layer, site, (norm,) if norm else MLP), visit)


def _norms(layer: nn.Module, site: Site) -> Norms:
    here = {name for name, _ in layer.named_children() if "norm" in name or name.startswith("ln_")}
    for norms in NORMS:
        if here == set(norms.names):
            break
    else:
        raise _unknown(layer, site, f"its norms are {', '.join(sorted(here)) or 'none'}")
    if scaled := [name for name in MULTIPLIERS if hasattr(layer, name)]:
        raise _unknown(layer, site, f"it scales what it adds by {scaled[0]}")
    return norms


def _child(layer: nn.Module, site: Site, names: tuple[str, ...]) -> nn.Module:
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise _unknown(layer, site, f"it has no {' or '.join(names)}")


def _unknown(layer: nn.Module, site: Site, reason: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(f"no site {site} known in {type(layer).__name__}: {reason}")


class _Argument:
    """Finds one argument of a call, however it was passed."""

    def __init__(self, names: list[str], name: str) -> None:
        self._index = names.index(name)
        self._name = name

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self._index] if self._index < len(args) else kwargs.get(self._name)


def _before(module: nn.Module, visit: Visit) -> None:
    """The module's input: its first argument, plus ``residual`` where it takes one."""
    # vLLM's custom ops, norms among them, take (*args, **kwargs) and pass them on to this.
    forward = getattr(module, "forward_native", module.forward)
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise UnsupportedEngineError(f"{type(module).__name__}.forward does not name its arguments")
    names = list(parameters)
    hidden = _Argument(names, "hidden_states" if "hidden_states" in names else names[0])
    residual = _Argument(names, "residual") if "residual" in names else None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(hidden.of(args, kwargs), residual.of(args, kwargs) if residual else None)

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, visit: Visit) -> None:
    """The module's output: the stream, or ``(hidden, residual)``, whose sum is the stream."""

    def hook(module: nn.Module, args: object, output: Any) -> None:
        if isinstance(output, tuple):
            visit(output[0], output[1])
        else:
            visit(output, None)

    module.register_forward_hook(hook)
