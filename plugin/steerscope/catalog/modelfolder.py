"""A model's folder, as far as a catalog must know it: sizes, tokenizer, names of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerscope.catalog.fingerprint import ServedModel
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"

HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
"""As most models call it, and as GPT-2 and others do."""

MLP_NORMS = {
    "Gemma2ForCausalLM": ("pre_feedforward_layernorm.weight", 1.0),
    "Gemma3ForCausalLM": ("pre_feedforward_layernorm.weight", 1.0),
    "Gemma3ForConditionalGeneration": ("pre_feedforward_layernorm.weight", 1.0),
    "LlamaForCausalLM": ("post_attention_layernorm.weight", 0.0),
    "MistralForCausalLM": ("post_attention_layernorm.weight", 0.0),
    "Qwen2ForCausalLM": ("post_attention_layernorm.weight", 0.0),
    "Qwen3ForCausalLM": ("post_attention_layernorm.weight", 0.0),
}
"""Where the RMSNorm before the MLP has its weight, and what is added to it before it multiplies."""

_STACK = re.compile(r"(?P<parent>.*?)(?P<list>layers|h|blocks)\.(?P<index>\d+)\.(?P<rest>.+)")
_NORM = re.compile(r"norm|ln_")
_ATTENTION = re.compile(r"attn|attention")
_EMBEDDING = re.compile(r"embed|wte|wpe")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What ``config.json`` says, of the text model where there are several, and all tensors."""

    folder: Path
    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Read the config and the headers of the weights; ``CatalogError`` names what is wrong."""
        path = folder / CONFIG
        config = _json(path)
        text = config.get("text_config") or config
        if not isinstance(text, dict):
            raise CatalogError(f"{path}: text_config: is no JSON object")
        files = _files(folder)
        shapes = _shapes(files)
        return cls(
            folder=folder,
            files=files,
            architecture=_architecture(path, config),
            hidden_size=_size(path, text, HIDDEN_SIZE),
            num_hidden_layers=_size(path, text, NUM_LAYERS),
            vocab_size=_vocab_size(path, text, config, shapes),
            shapes=shapes,
        )

    def as_served(self) -> ServedModel:
        """What a fingerprint is compared with."""
        sizes = self.hidden_size, self.num_hidden_layers, self.vocab_size
        return ServedModel(self.architecture, *sizes, folder=self.folder)

    def tokenizer_sha256(self) -> str | None:
        """Of ``tokenizer.json``, if there is one."""
        path = self.folder / TOKENIZER
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def telling_tensors(self) -> list[str]:
        """Few and small, yet a fine-tune changes them: norms at both ends, one projection."""
        parent, layers = self._stack()
        final = [
            name
            for name, shape in self.shapes.items()
            if len(shape) == 1
            and name.startswith(parent)
            and name.endswith(".weight")
            and not _STACK.match(name)
            and _NORM.search(name.removeprefix(parent))
        ]
        chosen = sorted(final, key=lambda name: (name.count("."), name))[:1]
        for layer in (layers[0], layers[-1]):
            chosen += self._first(layer, 1, _NORM)
        chosen += self._first(layers[0], 2, _ATTENTION)
        return list(dict.fromkeys(chosen))

    def mlp_norm(self, layer: int) -> FloatArray:
        """What the norm before a layer's MLP multiplies by, or ``CatalogError``."""
        if self.architecture not in MLP_NORMS:
            raise CatalogError(f"{self.architecture}: the norm before its MLP is not known here")
        ending, offset = MLP_NORMS[self.architecture]
        _, layers = self._stack()
        name = layers[layer].get(ending) if layer < len(layers) else None
        for file in self.files if name else ():
            with TensorFile(file) as tensors:
                if name in tensors.entries:
                    return tensors.read(name) + np.float32(offset)
        raise CatalogError(f"{self.folder}: layer {layer} has no {ending}")

    def multiplications(self) -> int:
        """Of one token, about: every matrix once (all experts), the embedding as the head."""
        matrices = sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if len(shape) == 2 and not _EMBEDDING.search(name) and "lm_head" not in name
        )
        return matrices + self.vocab_size * self.hidden_size

    def _stack(self) -> tuple[str, list[dict[str, str]]]:
        """The parent's name and, for each decoder layer, its tensors: what follows -> name."""
        stacks: dict[tuple[str, str], dict[int, dict[str, str]]]
        stacks = defaultdict(lambda: defaultdict(dict))
        for name in self.shapes:
            if found := _STACK.match(name):
                layer = stacks[found["parent"], found["list"]][int(found["index"])]
                layer[found["rest"]] = name
        whole = {
            parent: [layers[i] for i in sorted(layers)]
            for (parent, _), layers in stacks.items()
            if len(layers) == self.num_hidden_layers == max(layers) + 1
            and not re.search(r"vision|visual|audio", parent)
        }
        if len(whole) != 1:
            raise CatalogError(
                f"{self.folder}: {len(whole)} lists of {self.num_hidden_layers} layers among the "
                "weights; the decoder stack is not clear"
            )
        return next(iter(whole.items()))

    def _first(self, layer: dict[str, str], dimensions: int, kind: re.Pattern[str]) -> list[str]:
        found = [
            name
            for rest, name in sorted(layer.items())
            if rest.endswith(".weight")
            and kind.search(rest)
            and len(self.shapes[name]) == dimensions
        ]
        return found[:1]


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CatalogError(f"{path}: not a JSON object")
    return tree


def _architecture(path: Path, config: dict[str, Any]) -> str:
    told = config.get("architectures")
    if not isinstance(told, list) or not told or not isinstance(told[0], str):
        raise CatalogError(f"{path}: architectures: is missing or empty")
    return told[0]


def _size(path: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        if isinstance(value := config.get(key), int) and value > 0:
            return value
    raise CatalogError(f"{path}: {keys[0]}: is missing or no positive number")


def _vocab_size(
    path: Path, text: dict[str, Any], config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> int:
    """Some multimodal configs leave it out; then it is the height of the token embedding."""
    if "vocab_size" in text or "vocab_size" in config:
        return _size(path, config | text, ("vocab_size",))
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
    heights = {shape[0] for name, shape in shapes.items() if name.endswith(ends)}
    if len(heights) != 1:
        raise CatalogError(f"{path}: vocab_size: is missing")
    return heights.pop()


def _files(folder: Path) -> tuple[Path, ...]:
    """Those that the index names, or all there are."""
    index = folder / INDEX
    if index.exists():
        told = _json(index).get("weight_map")
        if not isinstance(told, dict):
            raise CatalogError(f"{index}: weight_map: is missing")
        names = sorted({str(name) for name in told.values()})
        if stray := [name for name in names if Path(name).name != name]:
            raise CatalogError(f"{index}: weight_map: {stray[0]!r} leads out of the folder")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CatalogError(f"{folder}: no *.safetensors, by which the model could be known again")
    return tuple(files)


def _shapes(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Of every tensor, from the files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with TensorFile(file) as tensors:
            shapes |= {name: entry.shape for name, entry in tensors.entries.items()}
    return shapes
