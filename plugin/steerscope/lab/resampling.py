"""Cases with known labels, and resamples of them by name.

One name asked in six phrasings is not six independent cases, so whole groups are drawn with
replacement. A resample is a weight for each case; the curves of many resamples come from one
sort of the scores.

Shapes: N cases, G groups, B resamples, b resamples at a time, K distinct scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from steerscope.errors import LabError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

_WEIGHTS_AT_ONCE: Final = 1_000_000
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """Cases that every given score has judged."""

    scores: dict[str, Floats]
    """Name of a score -> float64 [N], finite."""
    labels: Bools
    groups: Indices
    """[N], which of the sorted names."""
    num_without_score: int

    @classmethod
    def read(cls, labels: npt.ArrayLike, groups: npt.ArrayLike, **scores: npt.ArrayLike) -> Sample:
        """Check shapes and types; leave out and count the cases that a score is NaN for.

        Raises:
            LabError: naming the argument, if lengths differ, a label is not true or false, or a
                score is infinite.
        """
        labels_N, names_N = np.asarray(labels), np.asarray(groups, np.str_)
        if labels_N.size and labels_N.dtype != np.bool_:
            raise LabError(f"labels: must be true or false, not {labels_N.dtype}")
        read = {name: np.asarray(values, np.float64) for name, values in scores.items()}
        for name, array in {"labels": labels_N, "groups": names_N, **read}.items():
            if array.ndim != 1 or len(array) != len(labels_N):
                raise LabError(f"{name}: shape {array.shape} is not one per label {labels_N.shape}")
        for name, values_N in read.items():
            if np.isinf(values_N).any():
                raise LabError(f"{name}: a score is infinite")
        scored_N = ~np.any([np.isnan(values_N) for values_N in read.values()], axis=0)
        return cls(
            {name: values_N[scored_N] for name, values_N in read.items()},
            labels_N[scored_N].astype(np.bool_),
            np.unique(names_N[scored_N], return_inverse=True)[1],
            int((~scored_N).sum()),
        )

    @property
    def num_groups(self) -> int:
        """How many names the cases are about."""
        return int(self.groups.max()) + 1 if len(self.groups) else 0

    def ones(self) -> Floats:
        """The sample itself as a resample: weights [1, N]."""
        return np.ones((1, len(self.labels)))

    def groups_of_smaller_class(self) -> int:
        """How many names the class with fewer of them has."""
        return min(len(np.unique(self.groups[self.labels == label])) for label in (False, True))

    def missing_class(self) -> str | None:
        """Why nothing that compares positives with negatives is defined, if so."""
        if not len(self.labels):
            return "no case has a score"
        if not self.labels.any():
            return "no scored case is positive"
        return "no scored case is negative" if self.labels.all() else None


@dataclass(frozen=True, slots=True)
class Resamples:
    """How often each group was drawn in each resample: ``counts_BG``, float64."""

    counts_BG: Floats
    num_redrawn: int
    """Resamples that lacked a class which the cases have, and were drawn again."""

    @classmethod
    def draw(cls, sample: Sample, num_resamples: int, seed: int) -> Resamples:
        """Draw as many groups as there are, with replacement, ``num_resamples`` times."""
        G, B = sample.num_groups, num_resamples
        if not G:
            return cls(np.zeros((0, 0)), 0)
        classes = [label for label in (False, True) if (sample.labels == label).any()]
        holds_CG = np.zeros((len(classes), G))
        for row_G, label in zip(holds_CG, classes, strict=True):
            row_G[sample.groups[sample.labels == label]] = 1
        rng = np.random.default_rng(seed)
        kept_BG, redrawn = np.zeros((0, G)), 0
        while len(kept_BG) < B:
            drawn_BG = _draw(rng, B - len(kept_BG), G)
            good_B = (drawn_BG @ holds_CG.T > 0).all(axis=1)
            redrawn += int((~good_B).sum())
            kept_BG = np.concatenate([kept_BG, drawn_BG[good_B]])
        return cls(kept_BG, redrawn)

    def weights(self, sample: Sample) -> Iterator[Floats]:
        """Yield how often each case counts [b, N], some resamples at a time."""
        at_once = max(1, _WEIGHTS_AT_ONCE // max(1, len(sample.labels)))
        for start in range(0, len(self.counts_BG), at_once):
            yield self.counts_BG[start : start + at_once, sample.groups]


def _draw(rng: np.random.Generator, num: int, G: int) -> Floats:
    drawn = rng.integers(G, size=(num, G)) + G * np.arange(num)[:, None]
    return np.bincount(drawn.ravel(), minlength=num * G).reshape(num, G).astype(np.float64)


class Curves(NamedTuple):
    """Weight of the positives and negatives at or above each distinct score, highest first."""

    tp_bK: Floats
    fp_bK: Floats

    def auroc(self) -> Floats:
        """Area under the ROC curve [b], by trapezoids: ties count half."""
        tp_b, fp_b = self.tp_bK[:, -1], self.fp_bK[:, -1]
        middle_bK = (self.tp_bK[:, 1:] + self.tp_bK[:, :-1]) / 2
        area_b: Floats = (np.diff(self.fp_bK) * middle_bK).sum(axis=1)
        return area_b / (tp_b * fp_b)

    def auprc(self) -> Floats:
        """Average precision [b]: precision at each score, weighted by the recall it adds."""
        seen_bK = np.maximum(self.tp_bK + self.fp_bK, 1.0)[:, 1:]
        added_bK = np.diff(self.tp_bK) / self.tp_bK[:, -1:]
        area_b: Floats = (added_bK * self.tp_bK[:, 1:] / seen_bK).sum(axis=1)
        return area_b

    def tpr_at(self, max_fpr: float) -> Floats:
        """Highest true positive rate [b] at a false positive rate of at most ``max_fpr``."""
        allowed_b1 = max_fpr * self.fp_bK[:, -1:] + _ROUNDING
        last_b1 = (self.fp_bK <= allowed_b1).sum(axis=1, keepdims=True) - 1
        return np.take_along_axis(self.tp_bK, last_b1, axis=1)[:, 0] / self.tp_bK[:, -1]


class Ranking:
    """The cases sorted by score once, to be weighed many times."""

    def __init__(self, scores_N: Floats, labels_N: Bools) -> None:
        self._order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[self._order_N]
        self._ends_K = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
        self._labels_N = labels_N[self._order_N]

    def curves(self, weights_bN: Floats) -> Curves:
        """Count from the highest score down; the first entry is above all scores."""
        sorted_bN = weights_bN[:, self._order_N]
        return Curves(
            self._at_or_above(sorted_bN * self._labels_N),
            self._at_or_above(sorted_bN * ~self._labels_N),
        )

    def _at_or_above(self, weights_bN: Floats) -> Floats:
        sums_bK = np.cumsum(weights_bN, axis=1)[:, self._ends_K]
        return np.pad(sums_bK, ((0, 0), (1, 0)))
