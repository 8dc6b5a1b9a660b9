"""What differs between two catalogs, one line for each thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from steerscope.catalog.authoring import same_encoder, stored_encoder
from steerscope.catalog.store import Catalog, FeatureVectors
from steerscope.catalog.tensors import FloatArray

HEAD = ("name", "version", "description", "model")


def differences(one: Catalog, other: Catalog) -> Iterator[str]:
    """``+`` what only the other has, ``-`` what only the first has, ``~`` what changed and how."""
    for key in HEAD:
        before, after = getattr(one.document, key), getattr(other.document, key)
        if before != after:
            yield f"~ {key}: {_brief(before)} -> {_brief(after)}"
    yield from _listed("feature", _named(one, "features"), _named(other, "features"), one, other)
    yield from _listed(
        "dictionary", _named(one, "dictionaries"), _named(other, "dictionaries"), one, other
    )
    yield from _listed("signal", _named(one, "signals"), _named(other, "signals"), one, other)
    yield from _listed("policy", _named(one, "policies"), _named(other, "policies"), one, other)
    yield from _listed("baseline", _baselines(one), _baselines(other), one, other)


def _named(catalog: Catalog, kind: str) -> dict[str, msgspec.Struct]:
    return {item.name: item for item in getattr(catalog.document, kind)}


def _baselines(catalog: Catalog) -> dict[str, msgspec.Struct]:
    return {f"{b.feature}, {b.phase}": b for b in catalog.document.baselines}


def _listed(
    kind: str,
    before: Mapping[str, msgspec.Struct],
    after: Mapping[str, msgspec.Struct],
    one: Catalog,
    other: Catalog,
) -> Iterator[str]:
    yield from (f"- {kind} {name}" for name in before if name not in after)
    yield from (f"+ {kind} {name}" for name in after if name not in before)
    for name in before:
        if name not in after:
            continue
        changes = list(_fields(before[name], after[name]))
        if kind == "feature":
            changes += _numbers(one.vectors[name], other.vectors[name])
        if kind == "dictionary" and not same_encoder(
            stored_encoder(one, name), stored_encoder(other, name)
        ):
            changes.append("its encoder")
        if changes:
            yield f"~ {kind} {name}: {'; '.join(changes)}"


def _fields(before: msgspec.Struct, after: msgspec.Struct) -> Iterator[str]:
    for key in before.__struct_fields__:
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            yield f"{key} {_brief(old)} -> {_brief(new)}"


def _numbers(before: FeatureVectors, after: FeatureVectors) -> Iterator[str]:
    for part in ("b_enc", "threshold"):
        old, new = getattr(before, part), getattr(after, part)
        if old != new:
            yield f"{part} {old:g} -> {new:g}"
    for part in ("W_enc", "W_dec"):
        yield from _cosine(part, getattr(before, part), getattr(after, part))


def _cosine(part: str, old: FloatArray | None, new: FloatArray | None) -> Iterator[str]:
    if old is None and new is None:
        return
    if old is None or new is None:
        yield f"{part} {'was added' if old is None else 'was removed'}"
    elif old.shape != new.shape:
        yield f"{part} of width {old.size} -> {new.size}"
    elif not np.array_equal(old, new):
        a, b = old.astype(np.float64), new.astype(np.float64)
        sizes = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        cosine = float(a @ b) / (sizes[0] * sizes[1]) if min(sizes) > 0 else 0.0
        yield f"{part} cosine {cosine:.6f}, norm {sizes[0]:g} -> {sizes[1]:g}"


def _brief(value: Any) -> str:
    """Short enough for a line; long trees are told as changed."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"({type(value).__name__})"
