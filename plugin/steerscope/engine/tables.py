"""The parameters of every steering row of a site, on the device, and the host's copy of them.

Shapes: S steering rows (row 0 neutral), F features of the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from steerscope.engine.reference import Rows
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
PARAMETERS = tuple(_NEUTRAL)
"""The order of the second axis of ``parameters_SPF``."""


class RowTables:
    """What each row does to each feature.

    A row is written on the host and copied to the device as a whole; on a CPU the two are one.

    Attributes:
        rows: the device's tables, in the equation's terms.
        parameters_SPF: float32, the host's; second axis as in ``PARAMETERS``.
        gate_index_SF: int64, the feature that gates each feature.
        max_dose_S: float32, the row's cap.
        edited_SF: int64, the features that a row edits, the first ``num_edited_S`` of them.
    """

    def __init__(self, names: Sequence[str], num_rows: int, device: torch.device) -> None:
        num_features = len(names)
        self._addresses = {name: index for index, name in enumerate(names)}
        self._neutral_PF = np.repeat(
            np.array([[_NEUTRAL[name]] for name in PARAMETERS], np.float32), num_features, axis=1
        )
        self.parameters_SPF = np.tile(self._neutral_PF, (num_rows, 1, 1))
        self.gate_index_SF = np.tile(np.arange(num_features), (num_rows, 1))
        self.max_dose_S = np.full(num_rows, INF, np.float32)
        self.edited_SF = np.zeros((num_rows, num_features), np.int64)
        self.num_edited_S = np.zeros(num_rows, np.int64)
        host = self.parameters_SPF, self.gate_index_SF, self.max_dose_S[:, None]
        self._tables = tuple(torch.from_numpy(each).to(device) for each in host)
        self._host = tuple(torch.from_numpy(each) for each in host)
        parameters, gate_index, max_dose = self._tables
        columns = dict(zip(PARAMETERS, parameters.unbind(1), strict=True))
        self.rows = Rows(**columns, gate_index=gate_index, max_dose=max_dose)

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return sum(table.nbytes for table in self._tables)

    def write(
        self, row: int, interventions: Iterable[Intervention], max_dose: float | None
    ) -> None:
        """Fill a row with the edits of this site; the rest of it is neutral."""
        self.parameters_SPF[row] = self._neutral_PF
        self.gate_index_SF[row] = np.arange(len(self._addresses))
        self.max_dose_S[row] = INF if max_dose is None else max_dose
        edits = [(self._addresses.get(i.feature), i) for i in interventions]
        here = [(feature, i) for feature, i in edits if feature is not None]
        for feature, intervention in here:
            self._write_edit(row, feature, intervention)
        edited = sorted({feature for feature, _ in here})
        self.edited_SF[row, : len(edited)] = edited
        self.num_edited_S[row] = len(edited)
        if not self._tables[0].is_cpu:
            for table, host in zip(self._tables, self._host, strict=True):
                table[row].copy_(host[row])

    def _write_edit(self, row: int, feature: int, intervention: Intervention) -> None:
        written = _parameters(intervention)
        if intervention.only_if_active:
            written["self_above"] = 0.0
        if (when := intervention.when) is not None:
            self.gate_index_SF[row, feature] = self._addresses[when.feature]
            written["gate_above"] = -INF if when.above is None else when.above
            written["gate_below"] = INF if when.below is None else when.below
        for name, value in written.items():
            self.parameters_SPF[row, PARAMETERS.index(name), feature] = value


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
