"""What commands print: tables for people; JSON and YAML, which say the same, for programs."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import what they need when they run
    from google.protobuf.message import Message


class Format(enum.StrEnum):
    """What ``-o`` takes."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def show(tree: object, how: Format) -> None:
    """Print a tree of plain data, as JSON unless YAML is asked for."""
    print(yaml_text(tree) if how is Format.YAML else json.dumps(tree, indent=2), end="")
    if how is not Format.YAML:
        print()


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a header, in columns."""
    table = [tuple(header), *(tuple(clean(str(cell)) or "-" for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def clean(text: str) -> str:
    """Text of others on one line, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def yaml_text(tree: object) -> str:
    """The tree as YAML, keys in their order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Never writes a node as a reference to another: they are not read back."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def text_node(dumper: Dumper, text: str) -> yaml.ScalarNode:
        odd = any(not c.isprintable() and c != "\n" for c in text)
        style = '"' if odd else "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, text_node)
    text: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def tree_of(message: Message) -> dict[str, Any]:
    """A message in protobuf's JSON mapping, with the names of the proto files."""
    from google.protobuf import json_format

    tree: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return tree


def word(enumeration: Any, number: int) -> str:
    """The last word of an enum's value, e.g. ``finished``; empty for the unspecified."""
    name: str = enumeration.Name(number)
    prefix = "".join(f"_{c}" if c.isupper() else c for c in enumeration.DESCRIPTOR.name).upper()
    found = name.removeprefix(prefix.lstrip("_") + "_").lower()
    return "" if found == "unspecified" else found
