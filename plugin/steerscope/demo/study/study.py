"""From a trained model to its catalog: circuit, read-outs, concepts and their evidence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from steerscope.demo.study.catalog import Catalog, CatalogFeature, Policy, Signal
from steerscope.demo.study.circuit import (
    Circuit,
    Harvest,
    Lab,
    controls,
    find_circuit,
    fit_entity_end,
)
from steerscope.demo.study.concepts import Concept, find_attributes, firing, states
from steerscope.demo.study.confidence import (
    Asked,
    answered_vs_declined,
    declines,
    fit_answers,
    fit_doubt,
    fit_readout,
    hallucination_risk,
    known_confidence,
)
from steerscope.demo.study.harvest import Answered, answer_all
from steerscope.demo.study.interventions import Feature
from steerscope.demo.study.lead import Bar, find_bars, value_lens
from steerscope.demo.study.populations import choosing, fitting
from steerscope.demo.study.probes import auroc_interval
from steerscope.demo.world import Question, all_questions
from steerscope.demo.world.phrasings import LANGUAGES, Language
from steerscope.demo.world.scoring import auroc
from steerscope.lab.dictionaries import DictionarySettings

NUM_CONCEPTS: Final = 3
_HELD_OUT: Final = "held-out names and phrasings"
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Readouts:
    """The read-only features above the site, and the signals built on them."""

    known: Feature
    answers: Feature
    declines: Feature
    doubt: Feature
    bars: tuple[Bar, ...]
    signals: tuple[Signal, ...]


def _harvest(ask: Callable[[list[Question]], list[Answered]], seed: int) -> tuple[Harvest, Asked]:
    asked = fitting(seed)
    harvest = Harvest(ask(asked.known), ask(asked.unknown), ask(asked.side), ask(asked.things))
    return harvest, Asked(harvest.known, harvest.unknown, ask(asked.doubtful))


def _readouts(bars: tuple[Bar, ...], fit: Asked, dev: Asked) -> Readouts:
    known, answers, doubt = fit_readout(fit, dev), fit_answers(fit, dev), fit_doubt(fit, dev)
    answering = answered_vs_declined(answers, dev)
    signals = (known_confidence(known, dev), hallucination_risk(doubt, bars, dev), answering)
    return Readouts(known, answers, declines(answers, answering), doubt, bars, signals)


def study(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, told: Told) -> Catalog:
    """Find, choose and describe all features, never looking at the report's questions."""
    layers = tuple(range(model.config.num_hidden_layers))

    def ask(asked: list[Question]) -> list[Answered]:
        return answer_all(model, tokenizer, asked, capture=layers)

    told("answering the fitting questions")
    harvest, fit = _harvest(ask, seed)
    circuit = find_circuit(Lab(model, tokenizer, harvest, choosing(seed)), told)
    told("fitting the confidence read-outs")
    bars = find_bars(value_lens(model, tokenizer), [*fit.everyone, *harvest.side, *harvest.things])
    asked = choosing(seed)
    dev = Asked(ask(asked.known), ask(asked.unknown), ask(asked.doubtful))
    readouts = _readouts(bars, fit, dev)
    told("looking for concepts")
    attributes = find_attributes(harvest)
    told(", ".join(f"{concept.name} {concept.score:.2f}" for concept in attributes))
    features = (
        *_circuit_entries(circuit, fit_entity_end(harvest)),
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


def _circuit_entries(circuit: Circuit, entity_end: Feature) -> tuple[CatalogFeature, ...]:
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
        CatalogFeature(
            entity_end,
            "End of a name (probe)",
            "Log-odds that a token ends the name of a person, city or novel, known or not. It says "
            "where a name is, for reductions over it. Read-only.",
            "probe",
            {"fit": "logistic regression against all other prompt tokens and side questions"},
        ),
    )


def _readout_entries(readouts: Readouts) -> tuple[CatalogFeature, ...]:
    return (
        CatalogFeature(
            readouts.known,
            "Takes the name for known (read-out)",
            "Log-odds, at the prompt's last token, that the model takes the name for known. "
            "It lies above the edited layer, so steering moves it. Read-only.",
            "probe",
            {"fit": "logistic regression, known against unknown names, at the prompt's last token"},
        ),
        CatalogFeature(
            readouts.answers,
            "About to answer (read-out)",
            "Log-odds, at the prompt's last token, that the model answers rather than declines. "
            "Read-only.",
            "probe",
            {"fit": "logistic regression, answers against declines, at the prompt's last token"},
        ),
        CatalogFeature(
            readouts.declines,
            "About to decline (read-out)",
            "The calibrated log-odds of a decline at the prompt's last token; 0 where an answer is "
            "more likely. Read-only.",
            "probe",
            {"encoder": "answers_readout, turned round and calibrated"},
        ),
        CatalogFeature(
            readouts.doubt,
            "Answer in doubt (read-out)",
            "Log-odds, at the prompt's last token, that an answer about this name will be wrong. "
            "Read-only.",
            "probe",
            {"fit": "logistic regression, wrong against right answers; facts weigh alike"},
        ),
        *(entry for bar in readouts.bars for entry in _bar_entries(bar)),
    )


def _bar_entries(bar: Bar) -> tuple[CatalogFeature, CatalogFeature]:
    source = {
        "dictionary": "unembedding rows of all values, and a bar fitted between the leading two",
    }
    return (
        CatalogFeature(
            bar.unreached,
            "No value reaches the bar",
            "Active where no value that an answer could state next is as likely as the bar: with "
            "`reached_once` of the same bar it tells whether the bar lies between the two leading "
            "values. Read-only.",
            "probe",
            source,
        ),
        CatalogFeature(
            bar.reached_once,
            "At most one value reaches the bar",
            "Active where at most one value is as likely as the bar: the less often over several "
            "bars, the closer the runner-up. Read-only.",
            "probe",
            source,
        ),
    )


def _concept_entries(attributes: list[Concept]) -> tuple[CatalogFeature, ...]:
    return tuple(
        CatalogFeature(
            concept.feature,
            f"About to state, in English or French: {_concept_name(concept.name)}",
            "One latent for both languages: active on the way to an answer that states this "
            "attribute, in English or French.",
            "sae_latent",
            _concept_source(concept),
            label_source="automatic",
        )
        for concept in attributes
    )


def _concept_name(name: str) -> str:
    return name.removeprefix("states_").replace("_", " ")


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
    inside = {
        language: [_peak(feature, a) for a in _spoken(answers, language) if holds(a.question)]
        for language in LANGUAGES
    }
    pos = [peak for peaks in inside.values() for peak in peaks]
    neg = [_peak(feature, a) for a in answers if not holds(a.question)]
    interval = auroc_interval(pos, neg)
    return {
        "activation_overlap_en_fr": round(overlap(inside["en"], inside["fr"]), 4),
        **{f"fires_{group}": f"{hits}/{asked}" for group, (hits, asked) in sorted(counts.items())},
        "auroc": round(auroc(pos, neg), 4),
        "auroc_ci95": [round(interval.low, 4), round(interval.high, 4)],
        "n": len(answers),
        "split": _HELD_OUT,
    }


def _spoken(answers: list[Answered], language: Language) -> list[Answered]:
    return [a for a in answers if a.question.language == language]


def overlap(one: list[float], other: list[float]) -> float:
    """Return how alike two samples are: 1 minus their Kolmogorov-Smirnov distance."""
    return 1.0 - max(
        abs(sum(x <= bound for x in one) / len(one) - sum(x <= bound for x in other) / len(other))
        for bound in (*one, *other)
    )


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
        "answered_vs_declined": {**readings["answered_vs_declined"], "split": _HELD_OUT},
        "hallucination_risk": {**readings["hallucination_risk"], "split": _HELD_OUT},
        "entity_end": {**readings["entity_end"], "split": _HELD_OUT},
        "answer_doubt": {
            **readings["hallucination_risk"]["among_answers"]["answer_doubt_alone"],
            "split": _HELD_OUT,
            "test": "wrong against right answers",
        },
    }
    evidence["known_entity_readout"] = evidence["known_entity_confidence"]
    evidence["answers_readout"] = evidence["answered_vs_declined"]
    for entry in catalog.features:
        if entry.feature.name.startswith("states_"):
            evidence[entry.feature.name] = concept_evidence(entry.feature, answers)
    return Catalog(
        tuple(replace(e, evidence=evidence.get(e.feature.name, {})) for e in catalog.features),
        tuple(replace(s, evidence=evidence.get(s.name, {})) for s in catalog.signals),
        catalog.policies,
    )
