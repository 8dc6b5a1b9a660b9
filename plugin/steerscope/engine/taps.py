"""A site's buffers and what the op does with them.

Shapes: T tokens of the step, T_max the most there can be, E of them steered, N rows of the buffers,
D model width, F features of the site, S steering rows (row 0 neutral). Buffers
live as long as the engine and are never reallocated: their addresses may be captured in a CUDA
graph.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steerscope.catalog.model import Activation, Feature, Site
from steerscope.catalog.store import Catalog, SiteKey
from steerscope.engine import native, ops, reference
from steerscope.engine.reference import Encoder, TopK
from steerscope.engine.tables import RowTables
from steerscope.steering.interventions import Intervention

NO_TOKENS = np.zeros(0, np.int64)
_aliases = itertools.count()


class StepRows:
    """Which steering row each token of the step has; shared by all sites, neutral between steps.

    Args:
        is_native: whether sites may take the path of ``native``, which visits the steered tokens
            alone, and not the one that makes no difference between tokens, as a captured graph
            must; by default where there is such a path.
        max_waiting: rows that steps may leave in the buffers before a step of the most tokens.

    Attributes:
        num_rows: of the sites' buffers: on a CPU they hold what waits as well.
        steered_E: int64 [E] the tokens with a row above 0, on the host.
        rows_T: int64 [T_max] every token's row on the device; 0 for unsteered, padded and dummy
            tokens. Kept up only while ``is_on_device``: native sites do without.
        scratch: float32 on the device, for what a site need not keep.
    """

    def __init__(
        self,
        max_num_tokens: int,
        device: torch.device,
        is_native: bool | None = None,
        max_waiting: int = 0,
    ) -> None:
        on_cpu, on_gpu = device.type == "cpu", device.type == "cuda"
        self.library = native.library() if on_cpu and is_native is not False else None
        self._native_T, self._native_E = np.zeros((2, max_num_tokens), np.int64)
        addresses = self._native_E.ctypes.data, self._native_T.ctypes.data
        self.native = native.Step(0, 0, *addresses)
        self.num_rows = max_num_tokens + max_waiting * on_cpu
        self.max_waiting = max_waiting
        self.is_on_device = False
        self._moves = on_cpu
        self._last_T = self.steered_E = self._last_E = NO_TOKENS
        self.rows_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self._staged_T = torch.zeros(max_num_tokens, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.scratch = torch.empty(0, device=device)

    def rows(self, num_tokens: int) -> slice:
        """The step's rows of the sites' buffers; only on a CPU they move, as the tape says."""
        first = int(self.native.first_row) if self._moves else 0
        return slice(first, first + num_tokens)

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Have at least so much float32 scratch, which sites use one after another."""
        if math.prod(shape) > self.scratch.numel():
            self.scratch = torch.empty(shape, device=self.scratch.device)

    def stage(self, rows_np: npt.NDArray[np.int64] | None) -> None:
        """Set the step's rows; None where nothing is steered.

        The very array of the step before says that they are the same.
        """
        if rows_np is None:
            return
        if rows_np is not self._last_T:
            self._last_T, self._last_E = rows_np, np.flatnonzero(rows_np)
            self._native_T[: len(rows_np)] = rows_np
            self._native_E[: len(self._last_E)] = self._last_E
        self.steered_E = self._last_E
        if not self.steered_E.size:
            return
        self.native.num_steered = len(self.steered_E)
        if self.is_on_device:
            if self._copied is not None:  # what the device has not fetched yet must stay
                self._copied.synchronize()
            staged_T = self._staged_T[: rows_np.size]
            staged_T.copy_(torch.from_numpy(rows_np))
            self.rows_T[: rows_np.size].copy_(staged_T, non_blocking=True)
            if self._copied is not None:
                self._copied.record()

    def clear(self) -> None:
        """Back to neutral, so that profiling and dummy runs edit nothing."""
        if self.steered_E.size:
            self.steered_E = NO_TOKENS
            self.native.num_steered = 0
            if self.is_on_device:
                self.rows_T.zero_()


@dataclass(frozen=True, slots=True)
class _Decoder:
    """What a site's features write at one place: rows of the others are zero."""

    W_dec_FD: Tensor
    mine_F: Tensor


class SiteTap:
    """One site of one engine: what the ops of its name do.

    Attributes:
        acts_TF: float32 [N, F] activations before any edit; those of the step, after the forward,
            at ``StepRows.rows``.
        deltas_TF: float32 [N, F] the edits made; valid at steered tokens only.
        doses_T: float32 [N] relative size of the edits, the larger one where the site
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
        self.name = str(key)
        self.features = features
        self._step = step
        self.encoder = _encoder(catalog, features, device)
        self._here = _decoder(catalog, features, key.site, device)
        self._there = None
        self.writes: Site | None = None
        for site in {feature.writes for feature in features} - {key.site}:
            self._there = _decoder(catalog, features, site, device)
            self.writes = site if self._there else None
        self._tables = RowTables([feature.name for feature in features], num_rows, device)
        shape = (step.num_rows, len(features))
        self.acts_TF = torch.zeros(shape, device=device)
        self.deltas_TF = torch.zeros(shape, device=device)
        self.doses_T = torch.zeros(shape[0], device=device)
        self.probe_D = torch.zeros(self.encoder.W_enc_DF.shape[0], device=device)
        # The selection among a whole dictionary is PyTorch's.
        library = None if self.encoder.dictionaries else step.library
        self._native = self._as_native(library) if library else None
        self._alias = f"{self.name}#{next(_aliases)}"
        self.is_native_as(self._alias)
        self._kernels = None if self._native else self._triton(device)
        step.is_on_device |= self._native is None
        self._is_probed = True

    @property
    def is_probed(self) -> bool:
        """Whether ``probe_D`` is kept up."""
        return self._is_probed

    @is_probed.setter
    def is_probed(self, wanted: bool) -> None:
        self._is_probed = wanted
        if self._native is not None:
            self._native.is_probed = wanted

    def is_native_as(self, name: str) -> bool:
        """Whether the native ops do for this site; if so they find it under ``name``."""
        if self._native is None or self._step.library is None:
            return False
        self._step.library.register(name, self._native)
        return True

    def acts_of_step(self, num_tokens: int) -> Tensor:
        """float32 [T, F], what was read of the step's tokens."""
        return self.acts_TF[self._step.rows(num_tokens)]

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Read every token's features; edit ``hidden_TD`` in place where steering holds.

        See ``reference``. Native code touches only the steered tokens; where the graph is captured
        every token takes the same path and the neutral row leaves all bits as they are.
        """
        if self._native is not None:
            ops.NATIVE.tap(hidden_TD, residual_TD, self._alias)
        elif self._kernels is not None:
            self._launch(self._kernels, hidden_TD, residual_TD)
        else:
            self._run(hidden_TD, _stream(hidden_TD, residual_TD))

    def write(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Add what the site's transcoders write here; their edits were made at the site."""
        assert self._there is not None
        if self._native is not None:
            ops.NATIVE.write(hidden_TD, residual_TD, self._alias)
        elif self._kernels is not None:
            self._land_kernel(self._kernels, self._there, hidden_TD, residual_TD)
        elif not self._is_neutral:
            self._land_all(self._there, hidden_TD, _stream(hidden_TD, residual_TD))

    def write_row(
        self, row: int, interventions: list[Intervention], max_dose: float | None = None
    ) -> None:
        """Fill a steering row with the edits of this site; the rest of it is neutral."""
        self._tables.write(row, interventions, max_dose)

    @property
    def _is_neutral(self) -> bool:
        """Whether nothing is steered for sure: a graph that is captured must not ask."""
        return self.acts_TF.is_cpu and not self._step.steered_E.size

    def _run(self, hidden_TD: Tensor, x_TD: Tensor) -> None:
        reference.encode(x_TD, self.encoder, self.acts_of_step(len(x_TD)))
        if self.is_probed:
            self.probe_D.copy_(x_TD[0])
        if not self._is_neutral:
            self._edit_all(hidden_TD, x_TD)

    def _as_native(self, library: native.Library) -> native.Site:
        W_enc_DF, b_enc_F, threshold_F, _ = self.encoder
        tables = self._tables
        arrays = {
            "panels": library.panels(W_enc_DF.numpy()),
            "b_enc_F": library.panels(b_enc_F.numpy()[None]),
            "threshold_F": library.panels(threshold_F.numpy()[None]),
            "acts_NF": self.acts_TF.numpy(),
            "deltas_NF": self.deltas_TF.numpy(),
            "doses_N": self.doses_T.numpy(),
            "probe_D": self.probe_D.numpy(),
            "edited_SF": tables.edited_SF,
            "num_edited_S": tables.num_edited_S,
            "gate_index_SF": tables.gate_index_SF,
            "parameters_SPF": tables.parameters_SPF,
            "max_dose_S": tables.max_dose_S,
        }
        places = {"here": self._here, "there": self._there}
        return native.Site.made(
            arrays,
            width=len(W_enc_DF),
            num_features=len(b_enc_F),
            is_probed=True,
            step=ctypes.pointer(self._step.native),
            **{
                name: native.decoder(each.W_dec_FD.numpy(), each.mine_F.numpy())
                for name, each in places.items()
                if each is not None
            },
        )

    def _triton(self, device: torch.device) -> ModuleType | None:
        """The kernels, where they run and have all that the site needs."""
        kernels = import_module("steerscope.engine.kernels")
        if self.encoder.dictionaries or not kernels.runs_on(device):
            return None
        width, num_features = self.encoder.W_enc_DF.shape
        self._step.reserve(kernels.scratch_shape(self.acts_TF.shape[0], width, num_features))
        self._cold = kernels.sizes(self.acts_TF.shape[0], width, num_features)
        return kernels

    def _launch(self, kernels: Any, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        cold, self._cold = self._cold, []
        for num_tokens in (*(size for size in cold if size < len(hidden_TD)), len(hidden_TD)):
            # vLLM's first forward pass is a neutral one of the most tokens there can be: all that
            # steps will need is compiled in it, and not while somebody waits.
            hidden, residual = hidden_TD[:num_tokens], residual_TD
            kernels.encode_and_edit(
                hidden,
                None if residual is None else residual[:num_tokens],
                self.encoder,
                self._tables.rows,
                self._step.rows_T,
                self.acts_TF,
                self.deltas_TF,
                self.doses_T,
                self._step.scratch,
                self.probe_D,
            )
        if self._here is not None:
            self._land_kernel(kernels, self._here, hidden_TD, residual_TD)

    def _land_kernel(
        self, kernels: Any, decoder: _Decoder, hidden_TD: Tensor, residual_TD: Tensor | None
    ) -> None:
        kernels.land(
            hidden_TD,
            residual_TD,
            decoder.W_dec_FD,
            decoder.mine_F,
            self._tables.rows.max_dose,
            self._step.rows_T,
            self.deltas_TF,
            self.doses_T,
        )

    def _edit_all(self, hidden_TD: Tensor, x_TD: Tensor) -> None:
        here = self._step.rows(len(x_TD))
        rows_TF = self._tables.rows.at(self._step.rows_T[: len(x_TD)])
        self.deltas_TF[here] = reference.edit(self.acts_TF[here], rows_TF)
        self.doses_T[here] = 0.0
        if self._here is not None:
            self._land_all(self._here, hidden_TD, x_TD)

    def _land_all(self, decoder: _Decoder, hidden_TD: Tensor, y_TD: Tensor) -> None:
        here, rows_T = self._step.rows(len(y_TD)), self._step.rows_T[: len(y_TD)]
        delta_TF, doses_T = self.deltas_TF[here], self.doses_T[here]
        written = reference.decode(
            delta_TF, decoder.W_dec_FD, y_TD, self._tables.rows.max_dose[rows_T]
        )
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
        -math.inf if feature.activation is Activation.IDENTITY else v.threshold
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
