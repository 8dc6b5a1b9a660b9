"""The same model, edited by plain Transformers: what a steered request must equal.

Written from the design's equation on the unfused Transformers modules, feature by feature,
sharing no code with the engine. Shapes: T tokens of one forward, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""In forward order."""


class LayerNames(NamedTuple):
    """Where Transformers keeps a decoder layer's parts."""

    layers: str
    attention: str
    """What it returns is added to the stream by the attention half."""
    mlp_norm: str
    """What enters it is the stream between the two halves."""
    mlp: str
    mlp_last: str
    """What it returns is added to the stream by the MLP half."""


LLAMA = LayerNames("model.layers", "self_attn", "post_attention_layernorm", "mlp", "mlp")
LAYER_NAMES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen3_moe": LLAMA,
    "mixtral": LLAMA,
    "gemma3_text": LayerNames(
        "model.layers",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "mlp",
        "post_feedforward_layernorm",
    ),
    "gpt2": LayerNames("transformer.h", "attn", "ln_2", "mlp", "mlp"),
}


def at_site(model: nn.Module, layer: int, site: str, see: Callable[[Tensor], None]) -> Any:
    """Show ``see`` the tensor [T, D] of every forward; what it writes into it is kept.

    Writing in place is what makes ``resid_mid`` editable: Transformers adds the very tensor
    that enters the MLP's norm to the MLP's output. Returns the hook's handle.
    """
    names = LAYER_NAMES[model.config.model_type]
    block = model.get_submodule(names.layers)[layer]
    match site:
        case "resid_pre":
            return block.register_forward_pre_hook(_before(see))
        case "attn_out":
            return block.get_submodule(names.attention).register_forward_hook(_after(see))
        case "resid_mid":
            return block.get_submodule(names.mlp_norm).register_forward_pre_hook(_before(see))
        case "mlp_in":
            return block.get_submodule(names.mlp).register_forward_pre_hook(_before(see))
        case "mlp_out":
            return block.get_submodule(names.mlp_last).register_forward_hook(_after(see))
        case "resid_post":
            return block.register_forward_hook(_after(see))
    raise ValueError(site)


def _before(see: Callable[[Tensor], None]) -> Any:
    return lambda module, args: see(args[0].squeeze(0))


def _after(see: Callable[[Tensor], None]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        see((output[0] if isinstance(output, tuple) else output).squeeze(0))

    return hook


@dataclass
class _Request:
    """One ``generate`` under way."""

    num_prompt: int
    interventions: Sequence[dict[str, Any]]
    max_dose: float | None
    acts: dict[str, list[float]]
    edges: dict[str, list[float]]
    start: int = 0
    """Position of the first token of the forward that runs."""
    crossing: dict[int, Tensor] = field(default_factory=dict)
    """By layer: what transcoders read at mlp_in and have yet to write at mlp_out."""


class Reference:
    """Greedy decoding of one prompt at a time, with interventions, in float32.

    A transcoder latent at ``mlp_in`` writes at ``mlp_out``, before the features there read;
    every other feature writes where it reads. All edits that read at one site read the same
    ``x``, unedited, and that is also what ``acts`` holds.
    """

    def __init__(self, model: Path, catalog: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tensors = load_file(catalog / "features.safetensors")
        document = yaml.safe_load((catalog / "catalog.yaml").read_text())
        self.features = {f["name"]: f for f in document["features"]}
        self.k = {d["name"]: d["k"] for d in document.get("dictionaries", ())}
        self.acts: dict[str, list[float]] = {}
        self.edges: dict[str, list[float]] = {}
        """Of the last ``generate``: where each feature that jumps does so, at every token."""

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        max_tokens: int,
        interventions: Sequence[dict[str, Any]] = (),
        max_dose: float | None = None,
        use_cache: bool = True,
    ) -> tuple[list[int], dict[str, list[float]]]:
        """Greedy tokens, and every feature's activation at every token fed to the model.

        With ``max_dose``, each write whose ``‖Δ‖ / ‖x‖`` is above it is shrunk to it, token
        by token; ``x`` is what the written tensor held just before that write.
        """
        tokens, fed, cache = list(prompt), list(prompt), None
        request = _Request(len(prompt), interventions, max_dose, self._empty(), self._empty())
        with self._hooked(request):
            for _ in range(max_tokens):
                output = self.model(torch.tensor([fed]), past_key_values=cache, use_cache=use_cache)
                tokens.append(int(output.logits[0, -1].argmax()))
                if use_cache:
                    request.start += len(fed)
                    fed, cache = tokens[-1:], output.past_key_values
                elif len(tokens) < len(prompt) + max_tokens:
                    request.acts, request.edges = self._empty(), self._empty()
                    fed = list(tokens)
        self.acts, self.edges = request.acts, request.edges
        return tokens[len(prompt) :], {name: list(values) for name, values in self.acts.items()}

    def _empty(self) -> dict[str, list[float]]:
        return {name: [] for name in self.features}

    def activation(self, name: str, x: Tensor) -> float:
        """One feature at one token, ``x`` [D]."""
        return float(self.activations(name, x[None])[0])

    def activations(self, name: str, x_TD: Tensor) -> Tensor:
        """One feature at every token [T]."""
        if self.features[name]["activation"] == "topk":
            top = self._top(name, x_TD)
            acts_TK = torch.zeros(len(x_TD), self.tensors[f"{self._owner(name)}.b_enc"].numel())
            acts_TK.scatter_(-1, top.indices, top.values.relu())
            return acts_TK[:, self.features[name]["latent"]]
        pre = x_TD @ self.tensors[f"{name}.W_enc"] + self.tensors[f"{name}.b_enc"][0]
        match self.features[name]["activation"]:
            case "identity":
                return pre
            case "relu":
                return pre.clamp_min(0.0)
            case _:
                return torch.where(pre > self.tensors[f"{name}.threshold"][0], pre, 0.0)

    def edge(self, name: str, x_TD: Tensor) -> Tensor:
        """What the feature must reach at every token to be active, [T]; empty if it cannot jump."""
        match self.features[name]["activation"]:
            case "jumprelu":
                return self.tensors[f"{name}.threshold"].expand(len(x_TD))
            case "topk":
                return self._top(name, x_TD).values[:, -1].relu()
        return x_TD.new_empty(0)

    def _owner(self, name: str) -> str:
        return str(self.features[name]["dictionary"])

    def _top(self, name: str, x_TD: Tensor) -> Any:
        """Values and indices of the k largest in the feature's dictionary, largest first."""
        owner = self._owner(name)
        pre_TK = x_TD @ self.tensors[f"{owner}.W_enc"].T + self.tensors[f"{owner}.b_enc"]
        return torch.topk(pre_TK, self.k[owner], dim=-1)

    @contextlib.contextmanager
    def _hooked(self, request: _Request) -> Iterator[None]:
        handles = []
        for layer in sorted({f["layer"] for f in self.features.values()}):
            for site in SITES:

                def see(x_TD: Tensor, layer: int = layer, site: str = site) -> None:
                    self._at(request, layer, site, x_TD)

                handles.append(at_site(self.model, layer, site, see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at(self, request: _Request, layer: int, site: str, x_TD: Tensor) -> None:
        if site == "mlp_out" and layer in request.crossing:
            _write(x_TD, request.crossing.pop(layer), request.max_dose)
        here = [n for n, f in self.features.items() if (f["site"], f["layer"]) == (site, layer)]
        acts = {name: self.activations(name, x_TD) for name in here}
        for name, values in acts.items():
            request.acts[name] += values.tolist()
            request.edges[name] += self.edge(name, x_TD).tolist()
        written = {False: torch.zeros_like(x_TD), True: torch.zeros_like(x_TD)}
        for edit in request.interventions:
            if edit["feature"] in acts:
                covered = _covered(edit, request.start, len(x_TD), request.num_prompt)
                delta_TD = self._delta(edit, acts)
                crosses = _crosses(self.features[edit["feature"]])
                written[crosses] += torch.where(covered[:, None], delta_TD, 0.0)
        if site == "mlp_in":
            request.crossing[layer] = written[True]
        _write(x_TD, written[False], request.max_dose)

    def _delta(self, edit: dict[str, Any], acts: dict[str, Any]) -> Tensor:
        """What the edit adds: [D] where ``acts`` holds numbers, [T, D] where it holds [T]."""
        f = torch.as_tensor(acts[edit["feature"]])
        changes = _edited(edit, f) - f
        if edit.get("only_if_active"):
            changes = torch.where(f > 0, changes, 0.0)
        if (when := edit.get("when")) is not None:
            g = torch.as_tensor(acts[when["feature"]])
            holds = (g > when.get("above", -1e30)) & (g < when.get("below", 1e30))
            changes = torch.where(holds, changes, 0.0)
        return changes[..., None] * self.tensors[f"{edit['feature']}.W_dec"]


def _edited(edit: dict[str, Any], f: Tensor) -> Tensor:
    if "clamp" in edit:
        return torch.full_like(f, edit["clamp"])
    if edit.get("ablate"):
        return torch.zeros_like(f)
    if "at_least" in edit:
        return f.clamp_min(edit["at_least"])
    if "at_most" in edit:
        return f.clamp_max(edit["at_most"])
    if "scale" in edit:
        return f * edit["scale"]
    return f + edit["add"]


def _crosses(feature: dict[str, Any]) -> bool:
    return feature["kind"] == "transcoder_latent" and feature["site"] == "mlp_in"


def _covered(edit: dict[str, Any], start: int, num_tokens: int, num_prompt: int) -> Tensor:
    """Which of the forward's tokens the edit's phase and span cover [T]."""
    position = torch.arange(start, start + num_tokens)
    covered = torch.ones(num_tokens, dtype=torch.bool)
    match edit.get("phase", "all"):
        case "prompt":
            covered &= position < num_prompt
        case "generation":
            covered &= position >= num_prompt
    if (span := edit.get("span")) is not None:
        covered &= (position >= span[0]) & (position < span[1])
    return covered


def _write(x_TD: Tensor, delta_TD: Tensor, max_dose: float | None) -> None:
    if max_dose is not None:
        size = torch.linalg.vector_norm(delta_TD, dim=-1, keepdim=True)
        limit = max_dose * torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        delta_TD = torch.where(size > limit, delta_TD * (limit / size), delta_TD)
    x_TD += delta_TD
