"""The same model, edited by plain Transformers: what a steered request must equal.

Written from the equation in design terms, feature by feature and token by token,
sharing no code with the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Reference:
    """Greedy decoding of one prompt at a time, with interventions, in float32."""

    def __init__(self, model: Path, catalog: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tensors = load_file(catalog / "features.safetensors")
        document = yaml.safe_load((catalog / "catalog.yaml").read_text())
        self.features = {f["name"]: f for f in document["features"]}
        self.acts: dict[str, list[float]] = {}

    def activation(self, name: str, x: torch.Tensor) -> float:
        pre = float(x @ self.tensors[f"{name}.W_enc"] + self.tensors[f"{name}.b_enc"][0])
        match self.features[name]["activation"]:
            case "identity":
                return pre
            case "relu":
                return max(pre, 0.0)
            case _:
                return pre if pre > float(self.tensors[f"{name}.threshold"][0]) else 0.0

    @torch.no_grad()
    def generate(
        self, prompt: list[int], max_tokens: int, interventions: list[dict[str, Any]] = ()
    ) -> tuple[list[int], dict[str, list[float]]]:
        """Greedy tokens, and every feature's activation at every token fed to the model."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            logits = self._forward(tokens, len(prompt), interventions)
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :], {k: list(v) for k, v in self.acts.items()}

    def _forward(
        self, tokens: list[int], num_prompt: int, interventions: list[dict[str, Any]]
    ) -> torch.Tensor:
        self.acts = {name: [] for name in self.features}
        layers = {f["layer"] for f in self.features.values()}
        hooks = [
            self.model.model.layers[layer].register_forward_hook(
                self._hook(layer, num_prompt, interventions)
            )
            for layer in layers
        ]
        try:
            return self.model(torch.tensor([tokens])).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int, num_prompt: int, interventions: list[dict[str, Any]]) -> Any:
        here = [name for name, f in self.features.items() if f["layer"] == layer]

        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            stream = hidden[0] if hidden.dim() == 3 else hidden
            edited = stream.clone()
            for position, x in enumerate(stream):
                acts = {name: self.activation(name, x) for name in here}
                for name, value in acts.items():
                    self.acts[name].append(value)
                for edit in interventions:
                    if edit["feature"] in acts and _covers(edit, position, num_prompt):
                        edited[position] += self._delta(edit, acts)
            edited = edited.reshape(hidden.shape)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def _delta(self, edit: dict[str, Any], acts: dict[str, float]) -> torch.Tensor:
        name = edit["feature"]
        f = acts[name]
        new = f
        if "clamp" in edit:
            new = edit["clamp"]
        elif edit.get("ablate"):
            new = 0.0
        elif "at_least" in edit:
            new = max(f, edit["at_least"])
        elif "at_most" in edit:
            new = min(f, edit["at_most"])
        elif "scale" in edit:
            new = f * edit["scale"]
        elif "add" in edit:
            new = f + edit["add"]
        if edit.get("only_if_active") and not f > 0:
            new = f
        if (when := edit.get("when")) is not None:
            g = acts[when["feature"]]
            if not (g > when.get("above", -1e30) and g < when.get("below", 1e30)):
                new = f
        return (new - f) * self.tensors[f"{name}.W_dec"]


def _covers(edit: dict[str, Any], position: int, num_prompt: int) -> bool:
    phase = edit.get("phase", "all")
    if phase == "prompt" and position >= num_prompt:
        return False
    if phase == "generation" and position < num_prompt:
        return False
    span = edit.get("span")
    return span is None or span[0] <= position < span[1]
