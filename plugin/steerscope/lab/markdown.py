"""Text and tables of the lab's pages: whatever a model says, the page stays whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = re.compile(r"[\\`*_<>|\[\]~$&]")
_BREAKS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")

NEWLINE = "⏎"


def text(said: str) -> str:
    """The text on one line, every mark of Markdown escaped, what cannot be seen spelled out."""
    lines = _BREAKS.sub(NEWLINE, said)
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in lines)
    return _MARKS.sub(r"\\\g<0>", seen)


def token(said: str) -> str:
    """A single token: a space at either end is shown."""
    left, right = len(said) - len(said.lstrip(" ")), len(said) - len(said.rstrip(" "))
    if left == len(said):
        return "␣" * left
    return "␣" * left + text(said.strip(" ")) + "␣" * right


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def file_name(said: str) -> str:
    """The text as part of a file's name, in letters that need no escape in a link."""
    return re.sub(r"[^\w.-]+", "-", said).strip("-.") or "-"
