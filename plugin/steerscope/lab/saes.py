"""Whole dictionaries for the lab: read from a published format, or trained on what was captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from steerscope.catalog.formats import Columns, Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Fingerprint
from steerscope.catalog.store import SiteKey
from steerscope.errors import CatalogError, LabError
from steerscope.lab import dictionaries
from steerscope.lab.candidates import Candidate, Dictionary
from steerscope.lab.dictionaries import DictionarySettings
from steerscope.lab.harvest import Harvest


def open_dictionary(reference: str, model: Fingerprint) -> Dictionary:
    """``FORMAT:PATH`` as a whole dictionary; raise ``LabError`` where it does not fit the model."""
    format, _, path = reference.partition(":")
    if not path:
        raise LabError(f"{reference!r}: write FORMAT:PATH, saelens:./sae say")
    try:
        with open_source(format, Path(path), Options(architecture=model.architecture)) as source:
            if source.d_in != model.hidden_size:
                raise LabError(f"{path}: reads width {source.d_in}, not {model.hidden_size}")
            if source.activation not in (Activation.RELU, Activation.JUMPRELU):
                raise LabError(
                    f"{path}: {source.activation} features are not searched, only relu and "
                    "jumprelu latents; import them into a catalog"
                )
            columns = source.columns(range(source.d_sae))
            key = SiteKey(source.layer, source.site)
            told = {"sae": path, **source.provenance}
            return Dictionary(key, columns, source.activation, source.kind, told)
    except CatalogError as error:
        raise LabError(str(error)) from None


def trained(
    settings: Sequence[DictionarySettings],
    num_sites: int,
    told: Callable[[str], None],
    keep: Path,
    model_name: str,
) -> Callable[[Harvest, Sequence[Candidate]], list[Dictionary]]:
    """Dictionaries trained where directions read best on dev, and kept in SAELens' format."""

    def train(seen: Harvest, found: Sequence[Candidate]) -> list[Dictionary]:
        order = dict.fromkeys(c.key for c in sorted(found, key=lambda c: -c.strength))
        made = []
        for key in list(order)[:num_sites]:
            for one in settings:
                told(f"training a dictionary of {one.d_sae} latents at {key}")
                trained_on = dictionaries.train(torch.from_numpy(seen.sample[key]), one)
                name = f"{key}-{one.d_sae}-seed{one.seed}"
                quality = dictionaries.measure(trained_on, torch.from_numpy(seen.sample[key]))
                dictionaries.save_saelens(
                    trained_on, keep / name, key.site, key.layer, model_name, one, quality
                )
                made.append(_dictionary(trained_on, key, name, one))
        return made

    return train


def _dictionary(
    made: dictionaries.Dictionary, key: SiteKey, name: str, settings: DictionarySettings
) -> Dictionary:
    threshold = torch.full((settings.d_sae,), made.threshold)
    columns = Columns(
        made.W_enc_DK.T.contiguous().numpy(),
        made.folded_bias().numpy(),
        threshold.numpy(),
        made.W_dec_KD.numpy(),
    )
    source = {
        "sae": name,
        "trained": f"BatchTopK, {settings.d_sae} latents, k={settings.k}, seed {settings.seed}",
        "unexplained_variance": f"{made.unexplained:.4f}",
    }
    return Dictionary(key, columns, Activation.JUMPRELU, FeatureKind.SAE_LATENT, source)
