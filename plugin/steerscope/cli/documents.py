"""Policies and rules in files: YAML or JSON, read strictly, one or several documents.

A policy has the shape that it has in the configuration:

    name: calm
    description: ...                      # what is not needed may be left out
    max_dose: 0.5
    interventions:
      - {feature: known_entity, clamp: 6.0}
    annotations: {team: search}
    expire_time: 2027-01-01T00:00:00Z

What ``policy get -o yaml`` prints is read again: its ``status`` is left aside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from steerscope.api.v1 import steering_pb2
from steerscope.cli.output import word
from steerscope.errors import ConfigError, SpecError
from steerscope.hub.conversions import POLICIES, interventions
from steerscope.steering.interventions import (
    Intervention,
    PolicyName,
    SteeringSpec,
    check_spec,
)
from steerscope.steering.rules import Rules

MAX_BYTES = 1 << 20
STDIN = "-"

Status = dict[str, object] | None
Kind = TypeVar("Kind", bound=msgspec.Struct)


class PolicyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A policy as files have it; equal documents, equal policies."""

    name: PolicyName
    interventions: tuple[Intervention, ...]
    max_dose: float | None = None
    description: str = ""
    annotations: dict[str, str] = {}
    expire_time: Annotated[datetime, msgspec.Meta(tz=True)] | None = None

    @property
    def tree(self) -> dict[str, object]:
        """Plain data with defaults left out, always in one order."""
        tree: dict[str, object] = {
            "name": self.name,
            "description": self.description or None,
            "max_dose": self.max_dose,
            "interventions": [_edit_tree(edit) for edit in self.interventions],
            "annotations": dict(sorted(self.annotations.items())) or None,
            "expire_time": _moment(self.expire_time),
        }
        return {key: value for key, value in tree.items() if value is not None}


class _PolicyFile(PolicyDocument, frozen=True, forbid_unknown_fields=True, kw_only=True):
    status: Status = None


class _RulesFile(Rules, frozen=True, forbid_unknown_fields=True, kw_only=True):
    status: Status = None


def read_policies(source: str) -> list[tuple[str, PolicyDocument]]:
    """Every policy in a file, or on stdin for ``-``, each with where it is.

    Raise ``ConfigError``, naming document and field, unless all of them are well formed.
    """
    found: list[tuple[str, PolicyDocument]] = []
    for where, tree in _documents(source):
        for place, each in _policies(where, tree):
            document = _policy(each, place)
            if document.name in (known.name for _, known in found):
                raise ConfigError(f"{place}: name: {document.name!r} is there twice")
            found.append((place, document))
    if not found:
        raise ConfigError(f"{source}: holds no policy")
    return found


def read_rules(source: str) -> Rules:
    """The rules in a file, or on stdin for ``-``; it says nothing of the kill switch."""
    documents = list(_documents(source))
    if len(documents) != 1:
        raise ConfigError(f"{source}: must be one document, not {len(documents)}")
    ((where, tree),) = documents
    found = _converted(tree, _RulesFile, where)
    if found.override is not None:
        raise ConfigError(f"{where}: override: is set by steerscope kill-switch")
    return Rules(default_policy=found.default_policy, bindings=found.bindings)


def read_edits(text: str, where: str) -> list[Intervention]:
    """Edits in a JSON list."""
    tree = _from_json(text, where)
    if not isinstance(tree, list):
        raise ConfigError(f"{where}: must be a list of edits")
    edits = [_converted(each, Intervention, f"{where}[{i}]") for i, each in enumerate(tree)]
    try:
        check_spec(SteeringSpec(interventions=tuple(edits)))
    except SpecError as error:
        raise ConfigError(f"{where}: {error}") from None
    return edits


def document_of(policy: steering_pb2.Policy) -> PolicyDocument:
    """A policy of the hub as a file would have it."""
    return PolicyDocument(
        name=policy.name.removeprefix(POLICIES).partition("@")[0],
        interventions=interventions(policy.interventions),
        max_dose=policy.max_dose if policy.HasField("max_dose") else None,
        description=policy.description,
        annotations=dict(policy.annotations),
        expire_time=moment(policy, "expire_time"),
    )


def status_of(policy: steering_pb2.Policy) -> dict[str, object]:
    """What the hub says of a policy beside what it is."""
    status: dict[str, object] = {
        "origin": word(steering_pb2.PolicyOrigin, policy.origin),
        "state": word(steering_pb2.PolicyState, policy.state),
        "state_reason": policy.state_reason,
        "etag": policy.etag,
        "revision_id": policy.revision_id,
        "create_time": _moment(moment(policy, "create_time")),
        "update_time": _moment(moment(policy, "update_time")),
    }
    return {key: value for key, value in status.items() if value}


def moment(message: Any, field: str) -> datetime | None:
    """A time of a message; None where it has none."""
    found: datetime | None = None
    if message.HasField(field):
        found = getattr(message, field).ToDatetime(UTC)
    return found


def _moment(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _edit_tree(edit: Intervention) -> dict[str, object]:
    tree: dict[str, Any] = msgspec.to_builtins(edit)
    if edit.when is not None:
        tree["when"] = {key: value for key, value in tree["when"].items() if value is not None}
    defaults = {"phase": "all", "only_if_active": False}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in tree.items()
        if value is not None and defaults.get(key) != value
    }


def _policies(where: str, tree: object) -> Iterator[tuple[str, object]]:
    if not isinstance(tree, list):
        yield where, tree
        return
    yield from ((f"{where}: [{i}]", each) for i, each in enumerate(tree))


def _policy(tree: object, where: str) -> PolicyDocument:
    found = _converted(tree, _PolicyFile, where)
    fields = {name: getattr(found, name) for name in PolicyDocument.__struct_fields__}
    document = PolicyDocument(**fields)
    try:
        check_spec(SteeringSpec(interventions=document.interventions, max_dose=document.max_dose))
    except SpecError as error:
        raise ConfigError(f"{where}: {error}") from None
    return document


def _converted(tree: object, kind: type[Kind], where: str) -> Kind:
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise ConfigError(": ".join(filter(None, (where, field, reason)))) from None


def _documents(source: str) -> Iterator[tuple[str, object]]:
    """The trees in a file, each with where it is; those that are empty are left out."""
    text = _text(source)
    name = "stdin" if source == STDIN else source
    is_json = source.endswith(".json") or (text.lstrip()[:1] in ("{", "[") and _is_json(text))
    trees = [_from_json(text, name)] if is_json else _from_yaml(text, name)
    for i, tree in enumerate(trees, 1):
        if tree is not None:
            yield (name if len(trees) == 1 else f"{name}: document {i}"), tree


def _text(source: str) -> str:
    try:
        if source == STDIN:
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{source}: longer than {MAX_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8") from None


def _is_json(text: str) -> bool:
    """Whether it is meant as JSON, not as YAML that begins with a bracket."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _from_json(text: str, where: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: {twice!r} is there twice")
        return tree

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: malformed JSON: {error}") from None


_MALFORMED = (
    yaml.YAMLError,
    ValueError,
    RecursionError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
)
"""What PyYAML raises for scalars that are not of the type that their tag says."""


def _from_yaml(text: str, where: str) -> list[object]:
    try:
        return list(yaml.load_all(text, Loader=_StrictLoader))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where}: {line}{error.problem}") from None
    except _MALFORMED as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: malformed YAML: {reason}") from None


class _StrictLoader(yaml.SafeLoader):
    """No key twice in a mapping, and no aliases, which can make a small file huge."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
