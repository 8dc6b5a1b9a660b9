"""Candidates for a feature that tells positive cases from negative ones, and how well each does.

Everything is fitted on the fit split and ranked on dev; the test split is looked at once, for what
is reported.

Shapes: N cases, n tokens of a case, D model width, K latents of a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from steerscope.catalog.formats import Columns
from steerscope.catalog.model import Activation, FeatureKind
from steerscope.catalog.store import FeatureVectors, SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.lab.harvest import Harvested, TokenChoice

REGULARISATION = (1.0, 0.1, 0.01, 0.001)
"""Inverse strengths C of the logistic probe; dev chooses."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A feature, the tokens it is read at, and which class it is higher on."""

    key: SiteKey
    choice: TokenChoice
    kind: FeatureKind
    activation: Activation
    vectors: FeatureVectors
    source: Mapping[str, str]
    dev_auroc: float = 0.0
    """Of positives over negatives, whatever the sign."""

    @property
    def is_positive(self) -> bool:
        """Whether it is higher on positive cases."""
        return self.dev_auroc >= 0.5

    @property
    def strength(self) -> float:
        """How well it tells the classes apart, either way up."""
        return max(self.dev_auroc, 1.0 - self.dev_auroc)

    def acts(self, x_nD: FloatArray) -> FloatArray:
        """Activations [n]."""
        pre_n = x_nD @ self.vectors.W_enc + np.float32(self.vectors.b_enc)
        if self.activation is Activation.IDENTITY:
            return pre_n
        return np.where(pre_n > self.vectors.threshold, pre_n, 0.0).astype(np.float32)

    def score(self, harvested: Harvested) -> float:
        """The case's score; NaN where the case has no such token."""
        acts_n = self.acts(harvested.at(self.key, self.choice))
        return float(acts_n.max()) if acts_n.size else float("nan")

    def scores(self, cases: Iterable[Harvested]) -> npt.NDArray[np.float64]:
        """The cases' scores [N]."""
        return np.array([self.score(case) for case in cases], np.float64)


@dataclass(frozen=True, slots=True)
class Sides:
    """Positive and negative cases of one split."""

    positive: Sequence[Harvested]
    negative: Sequence[Harvested]

    @property
    def all(self) -> list[Harvested]:
        """Positives first."""
        return [*self.positive, *self.negative]

    @property
    def labels(self) -> npt.NDArray[np.bool_]:
        """Which of ``all`` are positive [N]."""
        return np.arange(len(self.positive) + len(self.negative)) < len(self.positive)

    @property
    def names(self) -> list[str]:
        """What each of ``all`` is about: what resampling keeps together."""
        return [h.case.name for h in self.all]

    def at(self, key: SiteKey, choice: TokenChoice) -> tuple[FloatArray, FloatArray]:
        """One stream a case: [N+, D] and [N-, D], at the last of the chosen tokens."""
        sides = [[h.at(key, choice)[-1:] for h in side] for side in (self.positive, self.negative)]
        return np.concatenate(sides[0]), np.concatenate(sides[1])


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A whole dictionary at one site, its columns folded for the raw stream."""

    key: SiteKey
    columns: Columns
    activation: Activation
    kind: FeatureKind
    source: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.columns.W_enc)

    def acts(self, x_nD: FloatArray) -> FloatArray:
        """Activations [n, K]."""
        pre_nK = x_nD @ self.columns.W_enc.T + self.columns.b_enc
        threshold = self.columns.threshold
        acts_nK = np.where(pre_nK > (0.0 if threshold is None else threshold), pre_nK, 0.0)
        return acts_nK.astype(np.float32)

    def vectors(self, latent: int) -> FeatureVectors:
        """One latent's vectors."""
        columns = self.columns
        return FeatureVectors(
            W_enc=columns.W_enc[latent],
            b_enc=float(columns.b_enc[latent]),
            threshold=0.0 if columns.threshold is None else float(columns.threshold[latent]),
            W_dec=None if columns.W_dec is None else columns.W_dec[latent],
        )


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """P(a positive scores above a negative), ties counting half, of each column [K]."""
    pos, neg = np.asarray(positive), np.asarray(negative)
    ranks = rankdata(np.concatenate([pos, neg]), axis=0)
    num_pos, num_neg = len(pos), len(neg)
    wins = ranks[:num_pos].sum(axis=0) - num_pos * (num_pos + 1) / 2
    return np.asarray(wins / (num_pos * num_neg), np.float64)


def directions(fit: Sides, dev: Sides, key: SiteKey, choice: TokenChoice) -> list[Candidate]:
    """The difference of means and the logistic probe, fitted on ``fit``, scored on ``dev``."""
    pos_ND, neg_ND = fit.at(key, choice)
    made = [
        Candidate(
            key,
            choice,
            FeatureKind.DIRECTION,
            Activation.IDENTITY,
            difference_of_means(pos_ND, neg_ND),
            {"fit": "difference of class means; 0 lies halfway"},
        )
    ]
    probes = [
        Candidate(
            key,
            choice,
            FeatureKind.PROBE,
            Activation.IDENTITY,
            logistic_probe(pos_ND, neg_ND, C),
            {"fit": "logistic regression, classes weighted alike", "C": str(C)},
        )
        for C in REGULARISATION
    ]
    judged = [_on_dev(candidate, dev) for candidate in [*made, *probes]]
    return [judged[0], max(judged[1:], key=lambda c: c.dev_auroc)]


def latents(
    dictionary: Dictionary, dev: Sides, choice: TokenChoice, num_best: int
) -> list[Candidate]:
    """The latents that tell dev's classes apart best, of either sign, ``num_best`` of each."""
    sides = [
        np.stack([dictionary.acts(h.at(dictionary.key, choice)).max(axis=0) for h in side])
        for side in (dev.positive, dev.negative)
    ]
    auroc_K = auroc(*sides)
    order = np.argsort(auroc_K)
    chosen = dict.fromkeys([*order[::-1][:num_best].tolist(), *order[:num_best].tolist()])
    return [
        Candidate(
            dictionary.key,
            choice,
            dictionary.kind,
            dictionary.activation,
            dictionary.vectors(latent),
            {**dictionary.source, "latent": str(latent)},
            float(auroc_K[latent]),
        )
        for latent in chosen
    ]


def difference_of_means(pos_ND: FloatArray, neg_ND: FloatArray) -> FeatureVectors:
    """f is the position along the difference, in its own length: +0.5 and -0.5 are the means.

    The decoder is the difference itself, so that setting f to a value moves the stream there.
    """
    high_D, low_D = (x_ND.mean(axis=0, dtype=np.float64) for x_ND in (pos_ND, neg_ND))
    difference_D = high_D - low_D
    # Classes that are one point, as at a template's last token before any layer, differ nowhere.
    W_enc = difference_D / (float(difference_D @ difference_D) or 1.0)
    b_enc = -float((high_D + low_D) @ W_enc) / 2
    return FeatureVectors(W_enc.astype(np.float32), b_enc, 0.0, difference_D.astype(np.float32))


def logistic_probe(pos_ND: FloatArray, neg_ND: FloatArray, C: float = 0.1) -> FeatureVectors:
    """Log-odds of the positive class, classes weighted alike; read-only."""
    x_ND = np.concatenate([pos_ND, neg_ND]).astype(np.float64)
    labels = np.arange(len(x_ND)) < len(pos_ND)
    scaler = StandardScaler().fit(x_ND)
    fitted = LogisticRegression(C=C, class_weight="balanced", max_iter=2000)
    fitted.fit(scaler.transform(x_ND), labels)
    W_enc = fitted.coef_[0] / scaler.scale_
    b_enc = float(fitted.intercept_[0] - scaler.mean_ @ W_enc)
    return FeatureVectors(W_enc.astype(np.float32), b_enc, 0.0, None)


def _on_dev(candidate: Candidate, dev: Sides) -> Candidate:
    scores = [candidate.scores(side)[:, None] for side in (dev.positive, dev.negative)]
    return replace(candidate, dev_auroc=float(auroc(*scores)[0]))
