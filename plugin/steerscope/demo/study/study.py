"""From a trained model to its catalog: circuit, read-outs, concepts and their evidence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from steerscope.demo.study.catalog import Catalog, CatalogFeature, Policy, Signal
from steerscope.demo.study.circuit import Circuit, Harvest, Lab, controls, find_circuit
from steerscope.demo.study.concepts import Concept, find_attributes, firing, states
from steerscope.demo.study.confidence import (
    Doubtful,
    fit_readout,
    fit_recall,
    hallucination_risk,
    known_confidence,
)
from steerscope.demo.study.dictionary import DictionarySettings
from steerscope.demo.study.harvest import Answered, answer_all
from steerscope.demo.study.interventions import Feature
from steerscope.demo.study.populations import choosing, fitting
from steerscope.demo.study.probes import auroc_interval
from steerscope.demo.world import Question, all_questions
from steerscope.demo.world.phrasings import Language
from steerscope.demo.world.scoring import auroc

NUM_CONCEPTS: Final = 3
_HELD_OUT: Final = "held-out names and phrasings"
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Readouts:
    """The read-only probes and the signals built on them."""

    readout: Feature
    recall: Feature
    signals: tuple[Signal, ...]


def _harvest(
    ask: Callable[[list[Question]], list[Answered]], seed: int
) -> tuple[Harvest, Doubtful]:
    asked = fitting(seed)
    harvest = Harvest(ask(asked.known), ask(asked.unknown), ask(asked.side), ask(asked.things))
    return harvest, Doubtful([*ask(asked.doubtful), *harvest.known, *harvest.unknown])


def _readouts(
    ask: Callable[[list[Question]], list[Answered]], harvest: Harvest, doubtful: Doubtful, seed: int
) -> Readouts:
    dev = choosing(seed)
    known, unknown = ask(dev.known), ask(dev.unknown)
    dev_doubtful = Doubtful([*ask(dev.doubtful), *known, *unknown])
    readout = fit_readout(harvest, known, unknown)
    recall = fit_recall(doubtful, dev_doubtful)
    confidence = known_confidence(readout, known, unknown)
    return Readouts(
        readout, recall, (confidence, hallucination_risk(readout, recall, dev_doubtful))
    )


def study(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, told: Told) -> Catalog:
    """Find, choose and describe all features, never looking at the report's questions."""
    layers = tuple(range(model.config.num_hidden_layers))

    def ask(asked: list[Question]) -> list[Answered]:
        return answer_all(model, tokenizer, asked, capture=layers)

    told("answering the fitting questions")
    harvest, doubtful = _harvest(ask, seed)
    circuit = find_circuit(Lab(model, tokenizer, harvest, choosing(seed)), told)
    told("fitting the confidence read-outs")
    readouts = _readouts(ask, harvest, doubtful, seed)
    told("looking for concepts")
    attributes = find_attributes(harvest)
    told(", ".join(f"{concept.name} {concept.score:.2f}" for concept in attributes))
    features = (
        *_circuit_entries(circuit),
        *_readout_entries(readouts),
        *_concept_entries(attributes[:NUM_CONCEPTS]),
        *_control_entries(circuit, seed),
    )
    return Catalog(features, readouts.signals, _policies(circuit, seed))


def held_out_known(language: Language) -> list[Question]:
    """Return every held-out question about the known persons kept for reports."""
    return all_questions("known", language, "held_out", "test", "person")


def _dictionary_name(settings: DictionarySettings) -> str:
    return f"BatchTopK, {settings.d_sae} latents, k={settings.k}, seed {settings.seed}"


def _dictionary_source(circuit: Circuit) -> dict[str, str]:
    settings = circuit.unknown.settings
    return {
        "sae": _dictionary_name(settings),
        "latent": str(circuit.unknown.latent),
        "sae_threshold": f"{circuit.unknown.dictionary.threshold:.4f}",
        "unexplained_variance": f"{circuit.unknown.dictionary.unexplained:.4f}",
        "mean_activation_on_unknown": f"{circuit.unknown.mean:.4f}",
    }


def _circuit_entries(circuit: Circuit) -> tuple[CatalogFeature, ...]:
    return (
        CatalogFeature(
            circuit.unknown.feature,
            "Unknown entity (can't answer)",
            "Active at the last token of a name the model does not know; it makes the model "
            "decline. Its threshold may be raised, on dev, above the dictionary's own.",
            "sae_latent",
            _dictionary_source(circuit),
        ),
        CatalogFeature(
            circuit.known,
            "Known entity (probe)",
            "A fitted read-out, not a dictionary latent: log-odds that a token ends a name the "
            "model knows; negative at unknown names and at every other token. Read-only.",
            "probe",
            {"fit": "logistic regression against unknown names, other tokens and side questions"},
        ),
    )


def _readout_entries(readouts: Readouts) -> tuple[CatalogFeature, ...]:
    return (
        CatalogFeature(
            readouts.readout,
            "Takes the name for known (read-out)",
            "Log-odds, at the prompt's last token, that the model takes the name for known. "
            "It lies above the edited layer, so steering moves it. Read-only.",
            "probe",
            {"fit": "logistic regression, known against unknown names, at the prompt's last token"},
        ),
        CatalogFeature(
            readouts.recall,
            "Recall confidence",
            "Log-odds that the stated fact is recalled, not guessed: its lowest value over the "
            "generated tokens tells, reached just before the value. Read-only.",
            "probe",
            {"fit": "logistic loss on the lowest score over generated tokens, right against wrong"},
        ),
    )


def _concept_entries(attributes: list[Concept]) -> tuple[CatalogFeature, ...]:
    return tuple(
        CatalogFeature(
            concept.feature,
            f"About to state: {concept.name.removeprefix('states_').replace('_', ' ')}",
            "One latent for both languages: active on the way to an answer that states this "
            "attribute, in English or French.",
            "sae_latent",
            _concept_source(concept),
        )
        for concept in attributes
    )


def _concept_source(concept: Concept) -> dict[str, str]:
    return {"sae": _dictionary_name(concept.settings), "latent": str(concept.latent)}


def _control_entries(circuit: Circuit, seed: int) -> tuple[CatalogFeature, ...]:
    return tuple(
        CatalogFeature(
            feature,
            f"Control {feature.name[-2:]}",
            "The unknown-entity encoder with a random latent's decoder, rescaled to the same norm: "
            "the same gate and the same edit size, in another direction.",
            "direction",
            {"encoder": "unknown_entity", "decoder_latent": str(latent), "seed": str(seed)},
        )
        for latent, feature in controls(circuit, seed)
    )


def _policies(circuit: Circuit, seed: int) -> tuple[Policy, ...]:
    control = controls(circuit, seed)[0][1]
    known_edit = circuit.force_known.edit
    return (
        Policy(
            "force-known",
            "Turn the unknown-entity latent off wherever it is active in the prompt: the model "
            "answers about names it does not know.",
            known_edit,
        ),
        Policy(
            "force-unknown",
            "Turn the unknown-entity latent on at names the model knows: it declines to answer.",
            circuit.force_unknown.edit,
        ),
        Policy(
            "control",
            "The same edit as force-known, gate and size, along a random latent's direction.",
            replace(known_edit, feature=control),
        ),
    )


def concept_evidence(feature: Feature, answers: list[Answered]) -> dict[str, object]:
    """Say how often a concept's latent fires for the concept in each language, and otherwise."""
    holds = states(feature.name.removeprefix("states_"))
    counts = firing(feature, answers, holds)
    peaks = [(_peak(feature, a), holds(a.question)) for a in answers]
    pos, neg = [p for p, h in peaks if h], [p for p, h in peaks if not h]
    interval = auroc_interval(pos, neg)
    return {
        **{f"fires_{group}": f"{hits}/{asked}" for group, (hits, asked) in sorted(counts.items())},
        "auroc": round(auroc(pos, neg), 4),
        "auroc_ci95": [round(interval.low, 4), round(interval.high, 4)],
        "n": len(peaks),
        "split": _HELD_OUT,
    }


def _peak(feature: Feature, answer: Answered) -> float:
    prompt_end = answer.transcript.prompt_resid[feature.layer][-1:]
    said = feature.acts(answer.transcript.generated_resid[feature.layer]).tolist()
    return float(max([*feature.acts(prompt_end).tolist(), *said]))


def with_evidence(catalog: Catalog, report: Mapping[str, Any], answers: list[Answered]) -> Catalog:
    """Return the catalog with what the report measured beside each feature and signal."""
    readings = report["readings"]
    evidence: dict[str, dict[str, object]] = {
        "unknown_entity": {
            **readings["unknown_entity"],
            "split": _HELD_OUT,
            "test": "activation at the name's last token, unknown against known persons",
            "fires_unknown": readings["firing"]["unknown_entity_on_unknown"],
            "fires_known": readings["firing"]["unknown_entity_on_known"],
            "steering": {**report["steered"], **report["controls"]},
        },
        "known_entity": {
            **readings["known_entity"],
            "split": _HELD_OUT,
            "test": "log-odds at the name's last token, known against unknown persons",
        },
        "known_entity_confidence": {**readings["known_entity_confidence"], "split": _HELD_OUT},
        "hallucination_risk": {**readings["hallucination_risk"], "split": _HELD_OUT},
    }
    evidence["known_entity_readout"] = evidence["known_entity_confidence"]
    evidence["recall_confidence"] = {"used_in": "hallucination_risk"}
    for entry in catalog.features:
        if entry.feature.name.startswith("states_"):
            evidence[entry.feature.name] = concept_evidence(entry.feature, answers)
    return Catalog(
        tuple(replace(e, evidence=evidence.get(e.feature.name, {})) for e in catalog.features),
        tuple(replace(s, evidence=evidence.get(s.name, {})) for s in catalog.signals),
        catalog.policies,
    )
