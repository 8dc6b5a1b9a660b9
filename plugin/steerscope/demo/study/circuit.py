"""The "can't answer" circuit: the unknown-entity latent, the gate, and how to turn them.

Everything is fitted on names kept for fitting and chosen on dev names and phrasings: the
dictionary's size and seed, the latent, its threshold and the clamp values. No random control is
looked at while choosing. Shape letters: N tokens, D width, K latents.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from steerscope.demo.making.model import SITE_LAYER
from steerscope.demo.study.harvest import (
    Answered,
    all_tokens,
    answer_all,
    entity_tokens,
    other_prompt_tokens,
    share,
)
from steerscope.demo.study.interventions import Activation, Feature, Intervention, When, clamp
from steerscope.demo.study.populations import Population
from steerscope.demo.study.probes import fit_two_classes
from steerscope.demo.world import Question
from steerscope.demo.world.scoring import Outcome, auroc
from steerscope.lab.dictionaries import Dictionary, DictionarySettings, train

NUM_CONTROLS: Final = 12
_SIZES: Final = ((192, 8), (128, 6), (96, 5))
_SEEDS: Final = (0, 1)
# Multiples of the latent's mean activation on unknown names, from the smallest edit to the largest.
_KNOWN_CLAMPS: Final = (0.0, -0.25, -0.5, -0.75, -1.0)
_UNKNOWN_CLAMPS: Final = (0.75, 1.0, 1.25, 1.5)
# Raised thresholds, as multiples of the mean activation; None keeps the dictionary's own.
_THRESHOLDS: Final = (None, 0.3)
_GATES: Final = (0.0, 2.0)
_ENOUGH: Final = 0.95
_ENTITY_REPEATS: Final = 4
_SIDE_FLOOR: Final = 0.98


@dataclass(frozen=True, slots=True)
class Harvest:
    """The fitting questions answered, with the residual streams of every captured layer."""

    known: list[Answered]
    unknown: list[Answered]
    side: list[Answered]
    things: list[Answered]

    @property
    def everyone(self) -> list[Answered]:
        """All answered questions."""
        return [*self.known, *self.unknown, *self.side, *self.things]


@dataclass(frozen=True, slots=True)
class Lab:
    """The model under study with its questions."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    harvest: Harvest
    dev: Population

    def outcome_share(
        self, asked: Sequence[Question], edit: Intervention, *outcomes: Outcome
    ) -> float:
        """Return the share of answers with these outcomes under one edit."""
        return share(answer_all(self.model, self.tokenizer, asked, [edit]), *outcomes)


@dataclass(frozen=True, slots=True)
class UnknownEntity:
    """A candidate latent with the dictionary it comes from."""

    feature: Feature
    dictionary: Dictionary
    settings: DictionarySettings
    latent: int
    mean: float
    """Mean activation on unknown names where active."""


@dataclass(frozen=True, slots=True)
class Turned:
    """A chosen edit with what it did on the dev split."""

    edit: Intervention
    multiple: float
    effect: float
    side: float


@dataclass(frozen=True, slots=True)
class Circuit:
    """The chosen latent, the gate, and both policies."""

    unknown: UnknownEntity
    known: Feature
    force_known: Turned
    force_unknown: Turned


def fit_known_entity(harvest: Harvest) -> Feature:
    """Fit the probe: known names' last tokens against unknown names' and all other tokens."""
    layer = SITE_LAYER
    entities = [*harvest.known, *harvest.unknown, *harvest.things]
    side_ND = torch.cat([a.transcript.prompt_resid[layer] for a in harvest.side])
    probe = fit_two_classes(
        entity_tokens(harvest.known, layer),
        entity_tokens(harvest.unknown, layer),
        other_prompt_tokens(entities, layer),
        side_ND,
    )
    return Feature("known_entity", layer, probe.weight_D, probe.bias, Activation.IDENTITY)


def fit_entity_end(harvest: Harvest) -> Feature:
    """Fit the probe: the last tokens of names, known or not, against all other prompt tokens."""
    layer = SITE_LAYER
    entities = [*harvest.known, *harvest.unknown, *harvest.things]
    side_ND = torch.cat([a.transcript.prompt_resid[layer] for a in harvest.side])
    probe = fit_two_classes(
        entity_tokens(entities, layer), other_prompt_tokens(entities, layer), side_ND
    )
    return Feature("entity_end", layer, probe.weight_D, probe.bias, Activation.IDENTITY)


def _dictionary_tokens(harvest: Harvest) -> Tensor:
    """Return the dictionary's training tokens [N, D]; entities' last tokens count five times."""
    entities = [*harvest.known, *harvest.unknown, *harvest.things]
    extra_ND = entity_tokens(entities, SITE_LAYER).repeat(_ENTITY_REPEATS, 1)
    return torch.cat([all_tokens(harvest.everyone, SITE_LAYER), extra_ND])


def find_latent(lab: Lab, settings: DictionarySettings) -> UnknownEntity:
    """Train one dictionary and take the latent that best tells unknown names from known ones."""
    dictionary = train(_dictionary_tokens(lab.harvest), settings)
    unknown_NK = dictionary.acts(entity_tokens(lab.harvest.unknown, SITE_LAYER))
    known_NK = dictionary.acts(entity_tokens(lab.harvest.known, SITE_LAYER))
    scores = [
        auroc(unknown_NK[::3, k].tolist(), known_NK[::3, k].tolist()) for k in range(settings.d_sae)
    ]
    latent = max(range(settings.d_sae), key=scores.__getitem__)
    active_N = unknown_NK[:, latent]
    return UnknownEntity(
        latent_feature(dictionary, latent, "unknown_entity", SITE_LAYER),
        dictionary,
        settings,
        latent,
        float(active_N[active_N > 0].mean()),
    )


def latent_feature(dictionary: Dictionary, latent: int, name: str, layer: int) -> Feature:
    """Take one latent out of a dictionary, its decoder bias folded into its encoder bias."""
    return Feature(
        name,
        layer,
        dictionary.W_enc_DK[:, latent].contiguous(),
        float(dictionary.folded_bias()[latent]),
        Activation.JUMPRELU,
        dictionary.threshold,
        dictionary.W_dec_KD[latent].contiguous(),
    )


def _first_enough(
    lab: Lab,
    edits: Sequence[tuple[float, Intervention]],
    asked: Sequence[Question],
    *outcomes: Outcome,
) -> Turned:
    """Return the first edit that does enough and spares side questions, else the best."""
    tried: list[Turned] = []
    for multiple, edit in edits:
        effect = lab.outcome_share(asked, edit, *outcomes)
        side = lab.outcome_share(lab.dev.side, edit, Outcome.CORRECT)
        tried.append(Turned(edit, multiple, effect, side))
        if effect >= _ENOUGH and side >= _SIDE_FLOOR:
            return tried[-1]
    return max(tried, key=lambda turned: turned.effect - 3 * max(0.0, _SIDE_FLOOR - turned.side))


def turn(lab: Lab, found: UnknownEntity, known: Feature) -> Circuit:
    """Choose the threshold, the gate and both clamp values for one latent."""
    circuits: list[Circuit] = []
    for raised in _THRESHOLDS:
        threshold = found.feature.threshold if raised is None else raised * found.mean
        feature = replace(found.feature, threshold=max(threshold, found.feature.threshold))
        on = _first_enough(
            lab,
            [(m, clamp(feature, m * found.mean, only_if_active=True)) for m in _KNOWN_CLAMPS],
            lab.dev.unknown,
            Outcome.CORRECT,
            Outcome.WRONG,
        )
        off = _first_enough(
            lab,
            [
                (m, clamp(feature, m * found.mean, when=When(known, gate)))
                for m in _UNKNOWN_CLAMPS
                for gate in _GATES
            ],
            lab.dev.known,
            Outcome.DECLINED,
        )
        circuits.append(Circuit(replace(found, feature=feature), known, on, off))
        if min(merit(on), merit(off)) >= _ENOUGH:
            break
    return max(circuits, key=circuit_merit)


def merit(turned: Turned) -> float:
    """Score an edit: its effect, less what it costs side questions."""
    return turned.effect - 3 * max(0.0, _SIDE_FLOOR - turned.side)


def circuit_merit(circuit: Circuit) -> float:
    """Score a circuit by its weaker policy, then by how small its edits are."""
    size = abs(circuit.force_known.multiple - 1) + abs(circuit.force_unknown.multiple)
    return min(merit(circuit.force_known), merit(circuit.force_unknown)) - 0.01 * size


def find_circuit(lab: Lab, told: Callable[[str], None]) -> Circuit:
    """Try every dictionary size and seed and keep the circuit that turns best on the dev split."""
    known = fit_known_entity(lab.harvest)
    circuits: list[Circuit] = []
    for d_sae, k in _SIZES:
        for seed in _SEEDS:
            found = find_latent(lab, DictionarySettings(d_sae, k, seed=seed))
            circuits.append(turn(lab, found, known))
            told(_described(circuits[-1]))
    return max(circuits, key=circuit_merit)


def _described(circuit: Circuit) -> str:
    found, on, off = circuit.unknown, circuit.force_known, circuit.force_unknown
    return (
        f"SAE {found.settings.d_sae}/k={found.settings.k}/seed {found.settings.seed}: "
        f"unexplained {found.dictionary.unexplained:.3f}, latent {found.latent}, "
        f"force-known x{on.multiple} {on.effect:.3f} (side {on.side:.2f}), "
        f"force-unknown x{off.multiple} {off.effect:.3f} (side {off.side:.2f})"
    )


def controls(circuit: Circuit, seed: int) -> list[tuple[int, Feature]]:
    """Return norm-matched controls: the edited feature's encoder with a random latent's decoder.

    Drawn by seed among all latents but the edited one, so that every control has the gate and the
    edit norm of the real policy at every token.
    """
    unknown = circuit.unknown
    assert unknown.feature.W_dec is not None
    norm = float(unknown.feature.W_dec.norm())
    others = [k for k in range(unknown.settings.d_sae) if k != unknown.latent]
    drawn = random.Random(f"controls:{seed}").sample(others, NUM_CONTROLS)
    return [
        (
            k,
            replace(
                unknown.feature, name=f"control_{index:02d}", W_dec=_rescaled(unknown, k, norm)
            ),
        )
        for index, k in enumerate(drawn)
    ]


def _rescaled(unknown: UnknownEntity, latent: int, norm: float) -> Tensor:
    row_D = unknown.dictionary.W_dec_KD[latent]
    return torch.nn.functional.normalize(row_D, dim=0) * norm
