r"""The filters of the list calls: comparisons joined by ``AND``, a small part of AIP-160.

    filter     = [ comparison { "AND" comparison } ]
    comparison = field operator value
    operator   = "=" | "!=" | "<" | "<=" | ">" | ">=" | ":"
    value      = "quoted text" | word
    field      = word

A word is letters, digits and ``_ . / @ + -``; in quoted text ``\"`` and ``\\`` stand for
``"`` and ``\\``. Which fields there are, and which operators each takes, is below. Anything else
(``OR``, ``NOT``, parentheses, wildcards, functions) is refused.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from steerscope.catalog.model import Feature, FeatureKind, Site
from steerscope.catalog.store import Catalog
from steerscope.errors import SpecError
from steerscope.hub.policies import Origin, State, StoredPolicy, feature_names

MAX_FILTER_CHARACTERS = 1024
MAX_COMPARISONS = 16

_TOKEN = re.compile(
    r'\s*(?:"(?P<text>(?:[^"\\]|\\["\\])*)"|(?P<op>!=|<=|>=|[=<>:])|(?P<word>[\w./@+-]+))\s*',
    re.ASCII,
)
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    ":": operator.contains,
}
_EQUALITY = ("=", "!=")
_ORDER = (*_EQUALITY, "<", "<=", ">", ">=")
_ANNOTATIONS = "annotations."

Item = TypeVar("Item")


class _Field(NamedTuple, Generic[Item]):
    """What a field of an item is, and how the value it is compared with is written."""

    read: Callable[[Item], object]
    value: Callable[[str], object] = str
    operators: tuple[str, ...] = _EQUALITY


class _Token(NamedTuple):
    kind: str
    text: str


def policy_filter(text: str) -> Callable[[StoredPolicy], bool]:
    """Whether a policy is to be listed. Raises ``SpecError`` for ``filter``."""
    fields: dict[str, _Field[StoredPolicy]] = {
        "name": _Field(lambda stored: stored.policy.name, _plain),
        "origin": _Field(lambda stored: stored.origin, Origin),
        "state": _Field(lambda stored: stored.state, State),
        "feature": _Field(lambda stored: feature_names(stored.policy.spec), str, (":",)),
    }

    def find(name: str) -> _Field[StoredPolicy] | None:
        if name.startswith(_ANNOTATIONS):
            key = name.removeprefix(_ANNOTATIONS)
            return _Field(lambda stored: stored.annotations.get(key))
        return fields.get(name)

    return _matcher(text, find, [*fields, f"{_ANNOTATIONS}KEY"])


def feature_filter(text: str, catalog: Catalog) -> Callable[[Feature], bool]:
    """Whether a feature is to be listed. Raises ``SpecError`` for ``filter``."""
    fields: Mapping[str, _Field[Feature]] = {
        "site": _Field(lambda feature: feature.site, Site),
        "layer": _Field(lambda feature: feature.layer, int, _ORDER),
        "kind": _Field(lambda feature: feature.kind, FeatureKind),
        "steerable": _Field(lambda f: catalog.vectors[f.name].W_dec is not None, _boolean),
    }
    return _matcher(text, fields.get, list(fields))


def _matcher(
    text: str, find: Callable[[str], _Field[Item] | None], names: list[str]
) -> Callable[[Item], bool]:
    if len(text) > MAX_FILTER_CHARACTERS:
        raise SpecError("filter", f"longer than {MAX_FILTER_CHARACTERS} characters")
    tokens = list(_tokens(text))
    tests: list[Callable[[Item], bool]] = []
    while tokens:
        if tests and (joint := tokens.pop(0)) != _Token("word", "AND"):
            raise SpecError("filter", f"{joint.text!r}: comparisons are joined by AND")
        name, symbol, value = _comparison(tokens)
        field = find(name)
        if field is None:
            raise SpecError("filter", f"{name!r} is no field of it; these are: {', '.join(names)}")
        tests.append(_test(name, field, symbol, value))
        del tokens[:3]
        if len(tests) > MAX_COMPARISONS:
            raise SpecError("filter", f"more than {MAX_COMPARISONS} comparisons")
    return lambda item: all(test(item) for test in tests)


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise SpecError("filter", f"{text[at:].strip()[:20]!r} is not supported")
        kind = match.lastgroup or ""
        found = match[kind]
        yield _Token(kind, re.sub(r"\\(.)", r"\1", found) if kind == "text" else found)
        at = match.end()


def _comparison(tokens: list[_Token]) -> tuple[str, str, str]:
    kinds = [token.kind for token in tokens[:3]]
    texts = [token.text for token in tokens[:3]]
    if kinds not in (["word", "op", "text"], ["word", "op", "word"]) or texts[0] in ("NOT", "OR"):
        raise SpecError("filter", f"{' '.join(texts)!r} is not a comparison (FIELD = VALUE)")
    return texts[0], texts[1], texts[2]


def _test(name: str, field: _Field[Item], symbol: str, text: str) -> Callable[[Item], bool]:
    if symbol not in field.operators:
        raise SpecError("filter", f"{name}: {symbol!r} is not one of {' '.join(field.operators)}")
    try:
        value = field.value(text)
    except ValueError as error:
        raise SpecError("filter", f"{name}: {error}") from None
    compare = _OPERATORS[symbol]
    return lambda item: compare(field.read(item), value)


def _plain(text: str) -> str:
    return text.removeprefix("policies/")


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"
