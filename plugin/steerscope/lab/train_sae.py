"""``lab train-sae``: a small dictionary for a site that nobody has trained one for.

Every case is asked with the site captured, as for a discovery; the dictionary is trained on nine
tenths of the tokens and measured on the rest, and written as SAELens writes one, so that
``import-sae`` reads it and so does everything else that reads SAELens' folders.

The trainer is ours (``dictionaries``). SAELens 6.54 has one that takes any iterator of activations
and would change none of the versions vLLM pins, but it brings 36 packages and 0.4 GB
(transformer-lens, datasets, pandas, statsmodels, wandb), one of them without a wheel, and eight
seconds of imports, for what is forty lines of PyTorch here. What matters is that the folders are
the same: the tests have SAELens read ours.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerscope.catalog.store import SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import LabError
from steerscope.lab import cases as case_files
from steerscope.lab.capture import parse_site
from steerscope.lab.cases import Case
from steerscope.lab.dictionaries import (
    Dictionary,
    DictionarySettings,
    Quality,
    measure,
    save_saelens,
    train,
)
from steerscope.lab.judging import Judge

HELD_OUT = 10
"""One token in so many is kept for measuring, all from the last cases asked."""
MIN_TOKENS_PER_LATENT = 4
"""Fewer held no latent to anything; a dictionary worth using wants hundreds."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A dictionary, and how well it does on tokens it was not trained on."""

    dictionary: Dictionary
    quality: Quality


def train_on(streams_ND: FloatArray, settings: DictionarySettings) -> Trained:
    """Train on the first nine tenths, measure on the rest; ``LabError`` if there is too little."""
    num_held_out = max(len(streams_ND) // HELD_OUT, 1)
    if len(streams_ND) - num_held_out < MIN_TOKENS_PER_LATENT * settings.d_sae:
        raise LabError(
            f"{len(streams_ND)} tokens for {settings.d_sae} latents: at least "
            f"{MIN_TOKENS_PER_LATENT} each are needed, and hundreds are better"
        )
    resid_ND = torch.from_numpy(np.ascontiguousarray(streams_ND, np.float32))
    taught_ND, held_out_ND = resid_ND[:-num_held_out], resid_ND[-num_held_out:]
    dictionary = train(taught_ND, settings)
    return Trained(dictionary, measure(dictionary, held_out_ND))


def capture(
    model: Path,
    asked: Sequence[Case],
    key: SiteKey,
    *,
    max_tokens: int,
    seed: int,
    engine_args: Mapping[str, Any],
) -> FloatArray:
    """The streams [N, D] at the site while the model answers the cases, prompts included."""
    from steerscope.lab.harvest import harvest  # starts vLLM

    found = harvest(
        model, asked, asked, [key], Judge(),
        max_tokens=max_tokens, seed=seed, engine_args=engine_args,
    )  # fmt: skip
    return found.sample[key]


def run(arguments: argparse.Namespace) -> int:
    """Capture, train, measure, write; tell the quality in one line."""
    settings = DictionarySettings(
        d_sae=arguments.d_sae, k=arguments.k, num_steps=arguments.steps, seed=arguments.seed
    )
    key, out = _site(arguments.site), arguments.out
    if out.exists():
        raise LabError(f"{out}: exists already")
    streams_ND = capture(
        arguments.model,
        case_files.load(arguments.cases),
        key,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        engine_args=arguments.vllm,
    )
    made = train_on(streams_ND, settings)
    save_saelens(
        made.dictionary, out, key.site, key.layer, arguments.model.name, settings, made.quality
    )
    print(f"{out}: {told(made.quality, settings)}")
    return 0


def _site(text: str) -> SiteKey:
    try:
        return parse_site(text)
    except ValueError as error:
        raise LabError(f"--site: {error}") from None


def told(quality: Quality, settings: DictionarySettings) -> str:
    """The quality in one line."""
    return (
        f"on {quality.num_tokens} held-out tokens {quality.unexplained:.1%} of the variance is "
        f"unexplained with {quality.l0:.1f} latents active; {quality.num_dead} of "
        f"{settings.d_sae} latents are dead"
    )
