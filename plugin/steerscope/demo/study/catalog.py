"""The demo's catalog as plain records, and the two files they are written to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerscope.catalog import store
from steerscope.demo.study.interventions import Activation, Feature, Intervention, Rivals, When

SCHEMA: Final = "steerscope.catalog/v1"
_FINGERPRINTED: Final = "model.norm.weight"
Evidence = Mapping[str, object]
Reduce = Literal["last_prompt_token", "min_first_generated"]


@dataclass(frozen=True, slots=True)
class CatalogFeature:
    """A feature with what a reader of the catalog must know about it."""

    feature: Feature
    label: str
    description: str
    kind: str
    """sae_latent, direction or probe."""
    source: Mapping[str, str]
    label_source: str = "human"
    """human, or automatic where the label was found by a search."""
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Term:
    """One feature's reduced activation in a signal."""

    feature: str
    reduce: Reduce
    weight: float
    first: int = 8
    """How many generated tokens `min_first_generated` looks at."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A probability: sigmoid(bias + sum of weight * reduced activation)."""

    name: str
    description: str
    terms: tuple[Term, ...]
    bias: float
    predicts: Mapping[str, str]
    """The label it predicts and, if only some cases count, among which."""
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """One named intervention on the prompt's tokens."""

    name: str
    description: str
    intervention: Intervention


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything the catalog folder says."""

    features: tuple[CatalogFeature, ...]
    signals: tuple[Signal, ...]
    policies: tuple[Policy, ...]

    def policy(self, name: str) -> Intervention:
        """Return the intervention of a policy."""
        return next(p.intervention for p in self.policies if p.name == name)


def _fingerprint(model_dir: Path) -> dict[str, object]:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    weight = load_file(model_dir / "model.safetensors")[_FINGERPRINTED]
    raw = weight.contiguous().numpy().astype("<f4").tobytes()
    return {
        "architecture": config["architectures"][0],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "tokenizer_sha256": hashlib.sha256((model_dir / "tokenizer.json").read_bytes()).hexdigest(),
        "weights": {_FINGERPRINTED: hashlib.sha256(raw).hexdigest()},
    }


def _feature_entry(entry: CatalogFeature) -> dict[str, object]:
    rivals = entry.feature.rivals
    place = {"dictionary": rivals.name, "latent": entry.feature.latent} if rivals else {}
    return {
        "name": entry.feature.name,
        "label": entry.label,
        "label_source": entry.label_source,
        "description": entry.description,
        "kind": entry.kind,
        "site": "resid_post",
        "layer": entry.feature.layer,
        "activation": entry.feature.activation.value,
        **place,
        "source": dict(entry.source),
        "evidence": dict(entry.evidence),
    }


def _dictionaries(features: Sequence[CatalogFeature]) -> dict[str, Feature]:
    """Return one feature of each TopK dictionary, by the dictionary's name."""
    found = [entry.feature for entry in features]
    return {feature.rivals.name: feature for feature in found if feature.rivals is not None}


def _dictionary_entry(feature: Feature) -> dict[str, object]:
    rivals = feature.rivals
    assert rivals is not None
    return {
        "name": rivals.name,
        "site": "resid_post",
        "layer": feature.layer,
        "d_sae": len(rivals.b_enc_K),
        "k": rivals.k,
    }


def _term_entry(term: Term) -> dict[str, object]:
    entry: dict[str, object] = {
        "feature": term.feature,
        "reduce": term.reduce,
        "weight": round(term.weight, 6),
    }
    return entry | ({"first": term.first} if term.reduce == "min_first_generated" else {})


def _signal_entry(signal: Signal) -> dict[str, object]:
    return {
        "name": signal.name,
        "description": signal.description,
        "terms": [_term_entry(term) for term in signal.terms],
        "bias": round(signal.bias, 6),
        "predicts": dict(signal.predicts),
        "labels": [
            {"label": "low", "below": 0.3},
            {"label": "elevated", "below": 0.7},
            {"label": "high"},
        ],
        "evidence": dict(signal.evidence),
    }


def _policy_entry(policy: Policy) -> dict[str, object]:
    edit = policy.intervention
    assert edit.low == edit.high, "the demo's policies are clamps"
    entry: dict[str, object] = {"feature": edit.feature.name}
    entry |= {"ablate": True} if edit.low == 0 else {"clamp": round(edit.low, 4)}
    if edit.only_if_active:
        entry["only_if_active"] = True
    if edit.when is not None:
        entry["when"] = {"feature": edit.when.feature.name, "above": round(edit.when.above, 4)}
    entry["phase"] = edit.phase
    return {"name": policy.name, "description": policy.description, "interventions": [entry]}


def _tensors(features: Sequence[CatalogFeature]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, of in _dictionaries(features).items():
        assert of.rivals is not None
        tensors[f"{name}.W_enc"] = of.rivals.W_enc_KD.contiguous()
        tensors[f"{name}.b_enc"] = of.rivals.b_enc_K
    for feature in (e.feature for e in features if e.feature.rivals is None):
        tensors[f"{feature.name}.W_enc"] = feature.W_enc.clone()
        tensors[f"{feature.name}.b_enc"] = torch.tensor([feature.b_enc])
        if feature.activation is Activation.JUMPRELU:
            tensors[f"{feature.name}.threshold"] = torch.tensor([feature.threshold])
        if feature.W_dec is not None:
            tensors[f"{feature.name}.W_dec"] = feature.W_dec.clone()
    return tensors


def write_catalog(catalog: Catalog, folder: Path, model_dir: Path) -> None:
    """Write both files; the fingerprint is taken from the model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "schema": SCHEMA,
        "name": "steerscope-demo",
        "version": "1",
        "description": "Features of the embedded demo model: a tiny Llama that knows some invented "
        "persons, declines names it does not know, and can be made to confabulate.",
        "model": _fingerprint(model_dir),
        "features": [_feature_entry(entry) for entry in catalog.features],
        "dictionaries": [_dictionary_entry(f) for f in _dictionaries(catalog.features).values()],
        "signals": [_signal_entry(signal) for signal in catalog.signals],
        "policies": [_policy_entry(policy) for policy in catalog.policies],
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    (folder / "catalog.yaml").write_text(text, encoding="utf-8")
    save_file(_tensors(catalog.features), folder / "features.safetensors")


def _read_feature(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], dictionaries: Mapping[str, Rivals]
) -> CatalogFeature:
    name = entry["name"]
    rivals = dictionaries.get(entry.get("dictionary", ""))
    latent = entry.get("latent", 0)
    threshold = tensors.get(f"{name}.threshold")
    feature = Feature(
        name=name,
        layer=entry["layer"],
        W_enc=tensors[f"{name}.W_enc"] if rivals is None else rivals.W_enc_KD[latent],
        b_enc=float(tensors[f"{name}.b_enc"] if rivals is None else rivals.b_enc_K[latent]),
        activation=Activation(entry["activation"]),
        threshold=0.0 if threshold is None else float(threshold),
        W_dec=tensors.get(f"{name}.W_dec"),
        rivals=rivals,
        latent=latent,
    )
    words = ("label", "label_source", "description", "kind", "source", "evidence")
    return CatalogFeature(feature, **{key: entry[key] for key in words})


def _read_dictionary(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rivals:
    name = entry["name"]
    return Rivals(name, tensors[f"{name}.W_enc"], tensors[f"{name}.b_enc"], entry["k"])


def _read_policy(entry: Mapping[str, Any], features: Mapping[str, Feature]) -> Policy:
    edit = entry["interventions"][0]
    value = 0.0 if edit.get("ablate") else edit["clamp"]
    when = edit.get("when")
    intervention = Intervention(
        features[edit["feature"]],
        low=value,
        high=value,
        only_if_active=edit.get("only_if_active", False),
        when=When(features[when["feature"]], when["above"]) if when else None,
        phase=edit["phase"],
    )
    return Policy(entry["name"], entry["description"], intervention)


def read_catalog(folder: Path) -> Catalog:
    """Read what `write_catalog` wrote."""
    tree = msgspec.to_builtins(store.load(folder).document)
    tensors = load_file(folder / "features.safetensors")
    rivals = {d["name"]: _read_dictionary(d, tensors) for d in tree["dictionaries"]}
    features = tuple(_read_feature(entry, tensors, rivals) for entry in tree["features"])
    by_name = {entry.feature.name: entry.feature for entry in features}
    signals = tuple(
        Signal(
            s["name"],
            s["description"],
            tuple(Term(t["feature"], t["reduce"], t["weight"], t["first"]) for t in s["terms"]),
            s["bias"],
            s["predicts"],
            s["evidence"],
        )
        for s in tree["signals"]
    )
    return Catalog(features, signals, tuple(_read_policy(p, by_name) for p in tree["policies"]))
