"""Linear probes and the statistics that say how good a feature is.

Shape letters: N samples, D width.
"""

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from steerscope.demo.world.scoring import auroc
from steerscope.lab.proportions import Interval

_RESAMPLES: Final = 400


class Probe(NamedTuple):
    """A linear read-out of the raw residual stream: score = x @ weight + bias, a log-odds."""

    weight_D: Tensor
    bias: float

    def scores(self, resid_ND: Tensor) -> Tensor:
        """Return the log-odds [N]."""
        return resid_ND @ self.weight_D + self.bias


def fit_logistic(
    x_ND: Tensor, labels_N: Tensor, weights_N: Tensor | None = None, l2: float = 1e-3
) -> Probe:
    """Fit a weighted logistic regression on standardised inputs; return it unscaled."""
    mean_D, scale_D = x_ND.mean(0), x_ND.std(0) + 1e-6
    z_ND = (x_ND - mean_D) / scale_D
    weight_D = torch.zeros(x_ND.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(
            z_ND @ weight_D + bias, labels_N, weight=weights_N
        )
        loss = loss + l2 * weight_D.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    unscaled_D = weight_D.detach() / scale_D
    return Probe(unscaled_D, float(bias.detach()) - float(mean_D @ unscaled_D))


def fit_two_classes(positive_ND: Tensor, *negatives: Tensor, l2: float = 1e-3) -> Probe:
    """Fit a probe; positives weigh as much as all negatives, their groups alike."""
    groups = [positive_ND, *negatives]
    shares = [0.5] + [0.5 / len(negatives)] * len(negatives)
    total = sum(len(group) for group in groups)
    weights = [
        torch.full((len(g),), s * total / len(g)) for g, s in zip(groups, shares, strict=True)
    ]
    labels = [torch.ones(len(positive_ND)), *(torch.zeros(len(group)) for group in negatives)]
    return fit_logistic(torch.cat(groups), torch.cat(labels), torch.cat(weights), l2)


def auroc_interval_by_name(
    scores: Sequence[float], positive: Sequence[bool], names: Sequence[str], seed: int = 0
) -> Interval:
    """Return the 95% percentile bootstrap interval of an AUROC, resampling names.

    Questions about one name are not independent, so a name is drawn with all of its answers. A
    draw without both classes has no AUROC and is drawn again.
    """
    if len(set(positive)) < 2:
        raise ValueError("positive: needs both classes")
    by_name: dict[str, list[tuple[float, bool]]] = {}
    for score, is_positive, name in zip(scores, positive, names, strict=True):
        by_name.setdefault(name, []).append((score, is_positive))
    rng, clusters = random.Random(f"bootstrap by name:{seed}"), list(by_name.values())
    drawn: list[float] = []
    while len(drawn) < _RESAMPLES:
        cases = [case for cluster in rng.choices(clusters, k=len(clusters)) for case in cluster]
        pos, neg = [s for s, p in cases if p], [s for s, p in cases if not p]
        if pos and neg:
            drawn.append(auroc(pos, neg))
    drawn.sort()
    return Interval(drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES) - 1])


def auroc_interval(pos: Sequence[float], neg: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95% percentile bootstrap interval of an AUROC, resampling both classes."""
    rng = random.Random(f"bootstrap:{seed}")
    drawn = sorted(
        auroc(rng.choices(pos, k=len(pos)), rng.choices(neg, k=len(neg))) for _ in range(_RESAMPLES)
    )
    return Interval(drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES) - 1])
