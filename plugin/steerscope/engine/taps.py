"""A site's buffers and what the op does with them.

Shapes: T tokens of the step, T_max the most there can be, D model width, F features
of the site, S steering rows (row 0 neutral). Buffers live as long as the engine and
are never reallocated: their addresses may be captured in a CUDA graph.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steerscope.catalog.model import Activation, Feature
from steerscope.catalog.store import Catalog, SiteKey
from steerscope.engine import ops, reference
from steerscope.engine.reference import Encoder, Rows
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


class SiteTap:
    """One site of one engine: the callable behind ``steerscope::tap``.

    Attributes:
        acts_TF: float32 [T_max, F] activations before any edit; valid after the forward.
        deltas_TF: float32 [T_max, F] the edits made; valid at steered tokens only.
        doses_T: float32 [T_max] relative size of the edits; valid at steered tokens only.
    """

    def __init__(
        self, catalog: Catalog, key: SiteKey, step: StepRows, num_rows: int, device: torch.device
    ) -> None:
        features = catalog.sites[key]
        self.key = key
        self.features = features
        self._addresses = {feature.name: index for index, feature in enumerate(features)}
        self._step = step
        self._encoder = _encoder(catalog, features, device)
        self._W_dec_FD = _decoder(catalog, features, device)
        self._rows = _neutral_rows(num_rows, len(features), device)
        shape = (step.rows_T.numel(), len(features))
        self.acts_TF = torch.zeros(shape, device=device)
        self.deltas_TF = torch.zeros(shape, device=device)
        self.doses_T = torch.zeros(shape[0], device=device)

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Read every token's features; edit ``hidden_TD`` in place where steering holds.

        See ``reference``. On a CPU only the steered tokens are touched at all; on a
        device whose graph is captured every token takes the same path and the neutral
        row's result is discarded, so that unsteered tokens stay bit-identical.
        """
        num_tokens = hidden_TD.shape[0]
        x_TD = hidden_TD.float()
        if residual_TD is not None:
            x_TD = x_TD + residual_TD.float()
        acts_TF = reference.encode(x_TD, self._encoder)
        self.acts_TF[:num_tokens] = acts_TF
        if not hidden_TD.is_cpu:
            self._edit_all(hidden_TD, x_TD, acts_TF)
        elif self._step.steered_T.numel():
            self._edit_some(hidden_TD, x_TD, acts_TF, self._step.steered_T)

    def write_row(self, row: int, interventions: list[Intervention]) -> None:
        """Fill a steering row with the edits of this site; the rest of it is neutral."""
        for name, value in _NEUTRAL.items():
            getattr(self._rows, name)[row] = value
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
        delta_TF = reference.edit(acts_TF[tokens], self._rows.at(self._step.rows_T[tokens]))
        delta_TD = reference.decode(delta_TF, self._W_dec_FD)
        hidden_TD[tokens] = (hidden_TD[tokens].float() + delta_TD).to(hidden_TD.dtype)
        self.deltas_TF[tokens] = delta_TF
        self.doses_T[tokens] = reference.dose(delta_TD, x_TD[tokens])

    def _edit_all(self, hidden_TD: Tensor, x_TD: Tensor, acts_TF: Tensor) -> None:
        num_tokens = hidden_TD.shape[0]
        rows_T = self._step.rows_T[:num_tokens]
        delta_TF = reference.edit(acts_TF, self._rows.at(rows_T))
        delta_TD = reference.decode(delta_TF, self._W_dec_FD)
        steered_TD = (hidden_TD.float() + delta_TD).to(hidden_TD.dtype)
        neutral_T1 = (rows_T == reference.NEUTRAL_ROW).unsqueeze(1)
        hidden_TD.copy_(torch.where(neutral_T1, hidden_TD, steered_TD))
        self.deltas_TF[:num_tokens] = delta_TF
        self.doses_T[:num_tokens] = reference.dose(delta_TD, x_TD)


class TapHook:
    """Forward hook of a decoder layer: calls the op on what the layer returns.

    Layers return ``(hidden, residual)``, whose sum is the stream, or the stream itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, tuple):
            ops.tap(output[0], output[1], self._name)
        else:
            ops.tap(output, None, self._name)


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
    )


def _decoder(catalog: Catalog, features: tuple[Feature, ...], device: torch.device) -> Tensor:
    vectors = [catalog.vectors[feature.name] for feature in features]
    rows = [v.W_dec if v.W_dec is not None else np.zeros_like(v.W_enc) for v in vectors]
    return torch.from_numpy(np.stack(rows)).to(device)


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
