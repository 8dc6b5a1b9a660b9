"""YAML as we read it: bounded before it becomes a tree.

libyaml composes by recursion in C, so that a deeply nested text ends the process, and a text of
aliases of aliases makes a tree of any size. Both show in the events, which need no recursion.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 64
"""Lists and mappings within each other."""
TOO_DEEP = f"more than {MAX_DEPTH} lists and mappings within each other"
MAX_ALIASED = 10_000
"""Nodes that aliases may add to those written."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(text: bytes) -> Any:
    """The text's tree; ``ValueError`` says why there is none."""
    try:
        _check(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        # libyaml looks ahead, and may meet a limit of its own before we meet ours.
        told = f"not YAML: {TOO_DEEP}" if "nesting depth" in str(error) else str(error)
        raise ValueError(told) from None
    except ValueError as error:
        raise ValueError(f"not YAML: {error}") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # What PyYAML raises for values such as ``!!bool maybe`` or ``!!timestamp soon``.
        raise ValueError(f"a value is not of its type ({type(error).__name__}: {error})") from None


def _check(text: bytes) -> None:
    """Raise ``ValueError`` if the tree would be too deep, or much larger than the text."""
    started: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    num_nodes = num_aliased = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias {event.anchor!r} stands for nothing before it")
            num_nodes += sizes[event.anchor]
            num_aliased += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            num_nodes += 1
            started.append((event.anchor, num_nodes))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = started.pop()
            if anchor:
                sizes[anchor] = num_nodes - before + 1
        if len(started) > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        if num_aliased > MAX_ALIASED:
            raise ValueError(f"aliases stand for more than {MAX_ALIASED} values")
