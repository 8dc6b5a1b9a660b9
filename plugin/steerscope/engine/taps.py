"""A site's buffers and what the op does with them.

Shapes: T tokens of the step, T_max the most there can be, D model width, F features
of the site, N of them in one TopK dictionary, S steering rows (row 0 neutral). Buffers live as
long as the engine and are never reallocated: their addresses may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steerscope.catalog.model import Activation, Feature, Site
from steerscope.catalog.store import Catalog, SiteKey
from steerscope.engine import reference
from steerscope.engine.reference import Encoder, Rows, TopK
from steerscope.steering.interventions import Intervention, Op

INF = float("inf")

_NEUTRAL = {
    "scale": 1.0,
    "add": 0.0,
    "lo": -INF,
    "hi": INF,
    "self_above": -INF,
    "gate_above": -INF,
    "gate_below": INF,
    "max_dose": INF,
}


class StepRows:
    """Which steering row each token of the step has; shared by all sites, neutral between steps.

    Attributes:
        rows_T: int64 [T_max] on the device; 0 for unsteered, padded and dummy tokens.
        steered_T: int64 [n] the tokens with a row above 0.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        self.rows_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.steered_T = torch.empty(0, dtype=torch.int64)

    def stage(self, rows_np: npt.NDArray[np.int64]) -> None:
        """Set the step's rows."""
        steered = np.flatnonzero(rows_np)
        self.steered_T = torch.from_numpy(steered)
        if steered.size:
            self.rows_T[: rows_np.size].copy_(torch.from_numpy(rows_np), non_blocking=True)

    def clear(self) -> None:
        """Back to neutral, so that profiling and dummy runs edit nothing."""
        if self.steered_T.numel():
            self.rows_T.zero_()
            self.steered_T = self.steered_T[:0]


@dataclass(frozen=True, slots=True)
class _Decoder:
    """What a site's features write at one place: rows of the others are zero."""

    W_dec_FD: Tensor
    mine_F: Tensor


class SiteTap:
    """One site of one engine: the callable behind ``steerscope::tap`` and ``steerscope::write``.

    Attributes:
        acts_TF: float32 [T_max, F] activations before any edit; valid after the forward.
        deltas_TF: float32 [T_max, F] the edits made; valid at steered tokens only.
        doses_T: float32 [T_max] relative size of the edits, the larger one where the site
            writes at two places; valid at steered tokens only.
        probe_D: float32 [D] what the site read at the step's first token, for the canary;
            on a CPU only while ``is_probed``.
        encoder: the read half, as the op uses it.
        writes: the other site that some features write at, or None.
    """

    def __init__(
        self, catalog: Catalog, key: SiteKey, step: StepRows, num_rows: int, device: torch.device
    ) -> None:
        features = catalog.sites[key]
        self.key = key
        self.features = features
        self.is_probed = True
        self._addresses = {feature.name: index for index, feature in enumerate(features)}
        self._step = step
        self.encoder = _encoder(catalog, features, device)
        self._here = _decoder(catalog, features, key.site, device)
        self._there = None
        self.writes: Site | None = None
        for site in {feature.writes for feature in features} - {key.site}:
            self._there = _decoder(catalog, features, site, device)
            self.writes = site if self._there else None
        self._rows = _neutral_rows(num_rows, len(features), device)
        shape = (step.rows_T.numel(), len(features))
        self.acts_TF = torch.zeros(shape, device=device)
        self.deltas_TF = torch.zeros(shape, device=device)
        self.doses_T = torch.zeros(shape[0], device=device)
        self.probe_D = torch.zeros(self.encoder.W_enc_DF.shape[0], device=device)

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Read every token's features; edit ``hidden_TD`` in place where steering holds.

        See ``reference``. On a CPU only the steered tokens are touched at all; on a
        device whose graph is captured every token takes the same path and the neutral
        row's result is discarded, so that unsteered tokens stay bit-identical.
        """
        x_TD = _stream(hidden_TD, residual_TD)
        acts_TF = reference.encode(x_TD, self.encoder)
        self.acts_TF[: len(x_TD)] = acts_TF
        if not hidden_TD.is_cpu:
            self.probe_D.copy_(x_TD[0])
            self._edit_all(hidden_TD, x_TD, acts_TF)
            return
        if self.is_probed:
            self.probe_D.copy_(x_TD[0])
        if self._step.steered_T.numel():
            self._edit_some(hidden_TD, x_TD, acts_TF, self._step.steered_T)

    def write(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Add what the site's transcoders write here; their edits were made at the site."""
        assert self._there is not None
        if not hidden_TD.is_cpu:
            self._land_all(self._there, hidden_TD, _stream(hidden_TD, residual_TD))
        elif self._step.steered_T.numel():
            y_TD = _stream(hidden_TD, residual_TD)
            self._land_some(self._there, hidden_TD, y_TD, self._step.steered_T)

    def write_row(
        self, row: int, interventions: list[Intervention], max_dose: float | None = None
    ) -> None:
        """Fill a steering row with the edits of this site; the rest of it is neutral."""
        for name, value in _NEUTRAL.items():
            getattr(self._rows, name)[row] = value
        if max_dose is not None:
            self._rows.max_dose[row] = max_dose
        self._rows.gate_index[row] = torch.arange(len(self.features))
        for intervention in interventions:
            if intervention.feature in self._addresses:
                self._write_edit(row, intervention)

    def _write_edit(self, row: int, intervention: Intervention) -> None:
        at = (row, self._addresses[intervention.feature])
        for name, value in _parameters(intervention).items():
            getattr(self._rows, name)[at] = value
        if intervention.only_if_active:
            self._rows.self_above[at] = 0.0
        if (when := intervention.when) is not None:
            self._rows.gate_index[at] = self._addresses[when.feature]
            self._rows.gate_above[at] = -INF if when.above is None else when.above
            self._rows.gate_below[at] = INF if when.below is None else when.below

    def _edit_some(self, hidden_TD: Tensor, x_TD: Tensor, acts_TF: Tensor, tokens: Tensor) -> None:
        rows_TF = self._rows.at(self._step.rows_T[tokens])
        self.deltas_TF[tokens] = reference.edit(acts_TF[tokens], rows_TF)
        self.doses_T[tokens] = 0.0
        if self._here is not None:
            self._land_some(self._here, hidden_TD, x_TD, tokens)

    def _land_some(
        self, decoder: _Decoder, hidden_TD: Tensor, y_TD: Tensor, tokens: Tensor
    ) -> None:
        max_dose_T1 = self._rows.max_dose[self._step.rows_T[tokens]]
        delta_TF = self.deltas_TF[tokens]
        written = reference.decode(delta_TF, decoder.W_dec_FD, y_TD[tokens], max_dose_T1)
        hidden_TD[tokens] = (hidden_TD[tokens].float() + written.delta_TD).to(hidden_TD.dtype)
        self.deltas_TF[tokens] = torch.where(decoder.mine_F, delta_TF * written.share_T1, delta_TF)
        self.doses_T[tokens] = torch.maximum(self.doses_T[tokens], written.dose_T)

    def _edit_all(self, hidden_TD: Tensor, x_TD: Tensor, acts_TF: Tensor) -> None:
        num_tokens = len(x_TD)
        rows_TF = self._rows.at(self._step.rows_T[:num_tokens])
        self.deltas_TF[:num_tokens] = reference.edit(acts_TF, rows_TF)
        self.doses_T[:num_tokens] = 0.0
        if self._here is not None:
            self._land_all(self._here, hidden_TD, x_TD)

    def _land_all(self, decoder: _Decoder, hidden_TD: Tensor, y_TD: Tensor) -> None:
        num_tokens = len(y_TD)
        rows_T = self._step.rows_T[:num_tokens]
        delta_TF, doses_T = self.deltas_TF[:num_tokens], self.doses_T[:num_tokens]
        written = reference.decode(delta_TF, decoder.W_dec_FD, y_TD, self._rows.max_dose[rows_T])
        steered_TD = (hidden_TD.float() + written.delta_TD).to(hidden_TD.dtype)
        neutral_T1 = (rows_T == reference.NEUTRAL_ROW).unsqueeze(1)
        hidden_TD.copy_(torch.where(neutral_T1, hidden_TD, steered_TD))
        delta_TF.copy_(torch.where(decoder.mine_F, delta_TF * written.share_T1, delta_TF))
        doses_T.copy_(torch.maximum(doses_T, written.dose_T))


def _stream(hidden_TD: Tensor, residual_TD: Tensor | None) -> Tensor:
    """x in float32: vLLM keeps the sum split where there is a residual."""
    x_TD = hidden_TD.float()
    return x_TD if residual_TD is None else x_TD + residual_TD.float()


def _encoder(catalog: Catalog, features: tuple[Feature, ...], device: torch.device) -> Encoder:
    vectors = [catalog.vectors[feature.name] for feature in features]
    thresholds = [
        -INF if feature.activation is Activation.IDENTITY else v.threshold
        for feature, v in zip(features, vectors, strict=True)
    ]
    return Encoder(
        torch.from_numpy(np.stack([v.W_enc for v in vectors], axis=1)).contiguous().to(device),
        torch.tensor([v.b_enc for v in vectors], dtype=torch.float32, device=device),
        torch.tensor(thresholds, dtype=torch.float32, device=device),
        _dictionaries(catalog, features, device),
    )


def _dictionaries(
    catalog: Catalog, features: tuple[Feature, ...], device: torch.device
) -> tuple[TopK, ...]:
    """The dictionaries that topk features among ``features`` compete in, each read once."""
    k = {dictionary.name: dictionary.k for dictionary in catalog.document.dictionaries}
    columns: dict[str, list[int]] = {}
    for column, feature in enumerate(features):
        if feature.dictionary is not None:
            columns.setdefault(feature.dictionary, []).append(column)

    def whole(name: str, columns_N: list[int]) -> TopK:
        vectors = catalog.dictionary_vectors(name)
        return TopK(
            torch.from_numpy(vectors.W_enc).to(device),
            torch.from_numpy(vectors.b_enc).to(device),
            k[name],
            torch.tensor([features[column].latent for column in columns_N], device=device),
            torch.tensor(columns_N, device=device),
        )

    return tuple(whole(name, columns_N) for name, columns_N in columns.items())


def _decoder(
    catalog: Catalog, features: tuple[Feature, ...], site: Site, device: torch.device
) -> _Decoder | None:
    """What the features write at ``site``; None if nothing."""
    vectors = [catalog.vectors[feature.name] for feature in features]
    mine = [
        v.W_dec is not None and feature.writes is site
        for feature, v in zip(features, vectors, strict=True)
    ]
    if not any(mine):
        return None
    rows = [
        v.W_dec if here and v.W_dec is not None else np.zeros_like(v.W_enc)
        for here, v in zip(mine, vectors, strict=True)
    ]
    return _Decoder(torch.from_numpy(np.stack(rows)).to(device), torch.tensor(mine, device=device))


def _neutral_rows(num_rows: int, num_features: int, device: torch.device) -> Rows:
    def table(name: str) -> Tensor:
        return torch.full((num_rows, num_features), _NEUTRAL[name], device=device)

    index = torch.arange(num_features, device=device).expand(num_rows, num_features).clone()
    return Rows(
        scale=table("scale"),
        add=table("add"),
        lo=table("lo"),
        hi=table("hi"),
        self_above=table("self_above"),
        gate_index=index,
        gate_above=table("gate_above"),
        gate_below=table("gate_below"),
        max_dose=torch.full((num_rows, 1), _NEUTRAL["max_dose"], device=device),
    )


def _parameters(intervention: Intervention) -> dict[str, float]:
    """The operation in the equation's terms; the rest of the row stays neutral."""
    value = intervention.value
    match intervention.op:
        case Op.CLAMP | Op.ABLATE:
            return {"lo": value, "hi": value}
        case Op.AT_LEAST:
            return {"lo": value}
        case Op.AT_MOST:
            return {"hi": value}
        case Op.SCALE:
            return {"scale": value}
        case Op.ADD:
            return {"add": value}
