"""A feature's card: one page of Markdown and a picture, beside the catalog's two files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerscope.catalog.model import LabelSource
from steerscope.lab import markdown, plots
from steerscope.lab.explain import Example, Explanation

NUM_BINS = 40
CARDS = "cards"
"""The folder's name in a catalog; not covered by the catalog's digest."""

_WHO = {
    LabelSource.HUMAN: "given by a person",
    LabelSource.AUTOMATIC: "given by a program, not reviewed",
}


def write(catalog: Path, explanations: Iterable[Explanation]) -> list[Path]:
    """Write each feature's card and an index; return what was written."""
    folder = catalog / CARDS
    folder.mkdir(exist_ok=True)
    written = []
    made = list(explanations)
    for explanation in made:
        name = explanation.feature.name
        page, picture = folder / f"{name}.md", folder / f"{name}.png"
        picture.write_bytes(_histogram(explanation))
        page.write_text(card(explanation), encoding="utf-8")
        written += [page, picture]
    index = folder / "README.md"
    index.write_text(_index(made), encoding="utf-8")
    return [*written, index]


def _histogram(explanation: Explanation) -> bytes:
    """Of what is not zero: a sparse feature is zero nearly everywhere."""
    values = explanation.values
    shown = values[values != 0]
    counts, edges = np.histogram(shown, NUM_BINS)
    title = f"{explanation.feature.name} ({explanation.feature.activation.value})"
    return plots.activation_histogram(
        edges.tolist(), counts.tolist(), int((values == 0).sum()), title
    )


def card(explanation: Explanation) -> str:
    """One feature's page."""
    feature = explanation.feature
    who = _WHO[feature.label_source]
    parts = [
        f"# {feature.name}",
        f"**{markdown.text(feature.label or '(no label)')}** (label {who})",
        feature.description,
        _facts(explanation),
        f"![Activations of {feature.name}]({feature.name}.png)",
        _section("Where it is highest", _examples(explanation.examples)),
        _section("What it writes, directly", _promoted(explanation)),
        _section("Evidence", _list(feature.evidence)),
        _section("Source", _list(feature.source)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _index(explanations: Sequence[Explanation]) -> str:
    rows = [
        (
            f"[{e.feature.name}]({e.feature.name}.md)",
            markdown.text(e.feature.label),
            f"{e.feature.site.value}.{e.feature.layer}",
            _density(e),
        )
        for e in explanations
    ]
    head = ("feature", "label", "site", "active at")
    return f"# Features\n\n{markdown.table(head, rows)}\n"


def _facts(explanation: Explanation) -> str:
    feature = explanation.feature
    steers = "read and steered" if explanation.steers else "read only"
    rows = [
        ("kind", f"{feature.kind.value}, {feature.activation.value}, {steers}"),
        ("site", f"{feature.site.value}, layer {feature.layer}"),
        ("active at", _density(explanation)),
    ]
    return markdown.table(("", ""), rows)


def _density(explanation: Explanation) -> str:
    share = f"{100 * explanation.density:.3g}% of {explanation.num_tokens:,} tokens"
    return share if explanation.is_sparse else f"{share} above zero (its sign only)"


def _examples(examples: Sequence[Example]) -> str:
    lines = []
    for example in examples:
        said = " (generated)" if example.generated else ""
        lines.append(f"- `{example.activation:.3g}`{said} …{_marked(example)}…")
    return "\n".join(lines)


def _marked(example: Example) -> str:
    """The stretch with its highest token in brackets, and bold: asterisks fail inside a word."""
    told = [markdown.text(token) for token in example.tokens]
    highest = example.tokens[example.peak]
    space = " " if highest.startswith(" ") else ""
    told[example.peak] = f"{space}<b>\\[{markdown.token(highest.removeprefix(' '))}\\]</b>"
    return "".join(told).strip()


def _promoted(explanation: Explanation) -> str:
    if explanation.promoted is None:
        return ""
    names = explanation.tokens_of
    rows = [
        (markdown.token(names[up]), f"{rise:+.2f}", markdown.token(names[down]), f"{fall:+.2f}")
        for (up, rise), (down, fall) in zip(
            explanation.promoted.promoted, explanation.promoted.suppressed, strict=True
        )
    ]
    return (
        "What one unit of activation adds to each token's logit, relative to the vocabulary's "
        "mean, were the final norm to divide by 1 (it divides all of them alike). Through its "
        "weight and the unembedding alone; later layers are not seen.\n\n"
        + markdown.table(("promoted", "", "suppressed", ""), rows)
    )


def _list(pairs: Mapping[str, Any], depth: int = 0) -> str:
    lines = []
    for key, value in pairs.items():
        lead = f"{'  ' * depth}- {markdown.text(key)}:"
        if isinstance(value, Mapping) and value:
            lines += [lead, _list(value, depth + 1)]
        else:
            lines.append(f"{lead} {markdown.text(str(value))}")
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
