"""What a discovery leaves in a catalog: the feature, its gate, a probe, policies and a signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from steerscope.catalog import authoring, store
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    CatalogPolicy,
    Feature,
    FeatureKind,
    Label,
    LabelSource,
    Reduction,
    Signal,
    Slug,
    Span,
    Target,
    Term,
)
from steerscope.catalog.store import Catalog, FeatureVectors
from steerscope.errors import CatalogError, LabError
from steerscope.lab import calibration
from steerscope.lab.candidates import Candidate
from steerscope.lab.discover import Discovery, Reading
from steerscope.lab.harvest import TokenChoice
from steerscope.lab.trial import Turned, gate_feature
from steerscope.steering.interventions import Intervention, SteeringSpec

_REDUCTIONS = {
    TokenChoice.LAST_ENTITY: Reduction.LAST_ENTITY_TOKEN,
    TokenChoice.LAST_PROMPT: Reduction.LAST_PROMPT_TOKEN,
    TokenChoice.MAX_SPAN: Reduction.MAX_ENTITY_SPAN,
}
BANDS = (Label(label="low", below=0.3), Label(label="unsure", below=0.7), Label(label="high"))


class Findings:
    """The entries of a catalog, named.

    ``name`` is what positive cases show: known_entity, say. A chosen latent that is active on the
    negative cases is called ``opposite``: unknown_entity. Case files call it ``label``.
    """

    def __init__(self, found: Discovery, name: str, opposite: str, label: str) -> None:
        self._found = found
        self._name = name
        self._label = label
        chosen = found.finalist.candidate
        self.feature_name = name if chosen.is_positive else opposite
        self.probe_name = f"{name}_probe"
        self.gate_name = f"{name}_gate"

    def write(self, folder: Path, *, append: bool) -> Catalog:
        """A new catalog, or these entries added to the one that is there."""
        document = self._base(folder, append)
        vectors = self._vectors()
        dictionaries: authoring.Encoders = {}
        if append:
            before = store.load(folder)
            vectors = {**before.vectors, **vectors}
            dictionaries = authoring.stored_encoders(before)
        document = msgspec.structs.replace(
            document,
            features=(*document.features, *self._features()),
            policies=(*document.policies, *self._policies()),
            signals=(*document.signals, self._signal()),
        )
        return authoring.write_catalog(folder, document, vectors, dictionaries, overwrite=append)

    def _base(self, folder: Path, append: bool) -> CatalogDocument:
        if append:
            return store.load(folder).document
        model = self._found.plan.model
        return CatalogDocument(
            schema=SCHEMA,
            name=f"{model.name}-{self._name}".lower(),
            version="1",
            model=authoring.fingerprint_of(model),
            features=(),
            description=f"Found by steerscope lab discover: what tells {self._name} cases apart.",
        )

    def _features(self) -> list[Feature]:
        finalist = self._found.finalist
        chosen = msgspec.structs.replace(
            finalist.feature,
            name=self.feature_name,
            label=f"{self.feature_name}: found by its cases",
            description=f"Read at {finalist.candidate.choice.value}; chosen on dev among "
            f"{len(self._found.ranked)} candidates for how far it turns answers both ways.",
            evidence=self._evidence(),
        )
        probe = self._found.probe
        key = finalist.candidate.key
        return [
            chosen,
            msgspec.structs.replace(
                gate_feature(self.gate_name, key, finalist.candidate.choice), name=self.gate_name
            ),
            Feature(
                name=self.probe_name,
                kind=FeatureKind.PROBE,
                site=probe.key.site,
                layer=probe.key.layer,
                activation=Activation.IDENTITY,
                label=f"{self._name}: fitted read-out",
                label_source=LabelSource.AUTOMATIC,
                source=dict(probe.source),
                evidence=_reading_evidence(self._reading(probe), self._found),
            ),
        ]

    def _vectors(self) -> dict[str, FeatureVectors]:
        finalist = self._found.finalist
        return {
            self.feature_name: finalist.candidate.vectors,
            self.gate_name: self._found.gates[finalist.gate],
            self.probe_name: self._found.probe.vectors,
        }

    def _reading(self, candidate: Candidate) -> Reading | None:
        return next((r for r in self._found.readings if r.candidate is candidate), None)

    def _policies(self) -> list[CatalogPolicy]:
        dashed = self._name.replace("_", "-")
        return [
            CatalogPolicy(
                name=f"{verb}-{dashed}",
                interventions=self._renamed(turned).interventions,
                description=f"Make any case look like a {side} one, "
                f"{turned.strength:g} times as far as it is by itself.",
            )
            for verb, side, turned in zip(
                ("force", "suppress"), ("positive", "negative"), self._found.chosen, strict=True
            )
        ]

    def _renamed(self, turned: Turned) -> SteeringSpec:
        finalist = turned.finalist
        names = {finalist.name: self.feature_name, finalist.gate: self.gate_name}
        spec = finalist.spec(turned.toward_positive, turned.strength)
        return msgspec.structs.replace(
            spec, interventions=tuple(_rename(i, names) for i in spec.interventions)
        )

    def _signal(self) -> Signal:
        probe, dev = self._found.probe, self._found.dev
        term = Term(
            feature=self.probe_name,
            reduce=_REDUCTIONS[probe.choice],
            weight=1.0,
            span=None
            if probe.choice is TokenChoice.LAST_PROMPT
            else Span(feature=self.gate_name, above=0.0),
        )
        fitted = calibration.fit(
            probe.scores(dev.all),
            dev.labels,
            np.array(dev.names),
            split=f"dev {self._found.split_digest}",
            seed=self._found.plan.seed,
        )
        return Signal(
            name=f"{self._name}_confidence",
            terms=(term,),
            bias=0.0,
            labels=BANDS,
            description=f"Probability that the case is a {self._name} one.",
            predicts=Target(label=self._label),
            calibration=fitted.calibration,
        )

    def _evidence(self) -> dict[str, Any]:
        found = self._found
        reading = self._reading(found.finalist.candidate)
        steering = {
            way: _steering_evidence(found, i)
            for i, way in enumerate(("toward_positive", "toward_negative"))
        }
        return {**_reading_evidence(reading, found), "steering": steering}


def tree(found: Discovery) -> Mapping[str, Any]:
    """The discovery for programs."""
    return {
        "split_digest": found.split_digest,
        "split_counts": dict(found.split_counts),
        "ranked": [_candidate(c) for c in found.ranked],
        "test": [
            {**_candidate(r.candidate), "score": msgspec.to_builtins(r.test)}
            for r in found.readings
        ],
        "turned_on_dev": [
            {
                **_candidate(t.finalist.candidate),
                "toward": "positive" if t.toward_positive else "negative",
                "strength": t.strength,
                "flipped": t.flipped,
                "malformed": t.malformed,
                "damaged": t.damaged,
            }
            for t in found.turned
        ],
        "chosen": _candidate(found.finalist.candidate),
        "confirmed": {
            way: _steering_evidence(found, i)
            for i, way in enumerate(("toward_positive", "toward_negative"))
        },
        "side_changed": list(found.side),
    }


def _steering_evidence(found: Discovery, way: int) -> dict[str, Any]:
    comparison, share = found.confirmed[way], found.contrast.shares[way]
    control = comparison.control(share)
    return {
        "share": share,
        "strength": found.chosen[way].strength,
        "unsteered": round(float(getattr(comparison.baseline, share)), 4),
        "edited": round(float(getattr(comparison.edit, share)), 4),
        "control_mean": round(control.mean, 4),
        "control_max": round(control.max, 4),
        "malformed": round(comparison.edit.malformed, 4),
        "dose": round(comparison.edit.dose, 4),
        "n": comparison.edit.num_cases,
    }


def _reading_evidence(reading: Reading | None, found: Discovery) -> dict[str, Any]:
    if reading is None or reading.test.auroc is None:
        return {}
    auroc = reading.test.auroc
    return {
        "auroc": round(auroc.value, 4),
        "auroc_ci95": [round(auroc.low, 4), round(auroc.high, 4)],
        "n": reading.test.num_cases,
        "split": f"test: held-out names and phrasings, {found.split_digest[:16]}",
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "kind": candidate.kind.value,
        "site": str(candidate.key),
        "tokens": candidate.choice.value,
        "source": dict(candidate.source),
        "dev_auroc": round(candidate.dev_auroc, 4),
    }


def _rename(intervention: Intervention, names: Mapping[str, str]) -> Intervention:
    when = intervention.when
    if when is not None:
        when = msgspec.structs.replace(when, feature=names[when.feature])
    return msgspec.structs.replace(intervention, feature=names[intervention.feature], when=when)


def check_names(names: Sequence[str], folder: Path, append: bool) -> None:
    """Before an hour's work: refuse names that cannot be or are taken, and folders in the way."""
    for name in names:
        try:
            msgspec.convert(name, Slug)
        except msgspec.ValidationError as error:
            raise LabError(f"name {name!r}: {error}") from None
    if not append:
        if folder.exists():
            raise CatalogError(f"{folder}: exists already (--append adds to a catalog)")
        return
    taken = {feature.name for feature in store.load(folder).document.features}
    for name in names:
        if name in taken:
            raise CatalogError(f"{folder}: has a feature {name!r} already")
