"""``steerscope policy``: what is stored under a name, from files and for people."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from steerscope.cli.connection import connected
from steerscope.cli.output import Format, show, show_table, word, yaml_text
from steerscope.errors import ConfigError, SpecError, SteerscopeError

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.api.v1 import steering_pb2
    from steerscope.cli.documents import PolicyDocument
    from steerscope.client import Client

DIFFERENT = 1
"""``diff`` ends with this if anything would change, with 0 if not."""

MAX_EDITS_SHOWN = 3


class _Change(NamedTuple):
    """What is to be done for a document, already found possible by the hub."""

    where: str
    document: PolicyDocument
    result: str
    etag: str = ""


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``policy`` and its parts to the main command."""
    parser = commands.add_parser("policy", help="policies of the hub: apply, get, diff, delete, …")
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = parts.add_parser(name, help=help, parents=[options])
        made.set_defaults(run=lambda arguments, _: run(arguments))
        return made

    apply = part(
        "apply", _apply, "create or change what a file says, once all of it is found possible"
    )
    _add_file(apply)
    apply.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    get = part("get", _get, "one policy, or all")
    get.add_argument("name", nargs="?", metavar="NAME")
    get.add_argument("--revision", default="", metavar="ID", help="as it was then")
    get.add_argument("--filter", default="", help="""of all, e.g. 'origin = "created"'""")
    diff = part("diff", _diff, "what apply would change; ends with 1 if anything, else 0")
    _add_file(diff)
    delete = part("delete", _delete, "remove policies, once all named are found to be removable")
    delete.add_argument("names", nargs="+", metavar="NAME")
    delete.add_argument("--etag", default="", help="only that very version; with one NAME")
    part("revisions", _revisions, "a policy as it is and was, newest first").add_argument(
        "name", metavar="NAME"
    )


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--file", required=True, help="YAML or JSON, one or several policies; - is stdin"
    )


def _apply(arguments: argparse.Namespace) -> int:
    from steerscope.cli.documents import read_policies

    documents = read_policies(arguments.file)
    with connected(arguments) as client:
        changes = [_planned(client, where, document) for where, document in documents]
        done: list[_Change] = []
        try:
            for change in changes:
                if not arguments.dry_run:
                    _carry_out(client, change, validate_only=False)
                done.append(change)
        finally:
            _show_changes(done, arguments)
    return 0


def _planned(client: Client, where: str, document: PolicyDocument) -> _Change:
    from steerscope.cli.documents import document_of

    current = _current(client, document.name)
    if current is None:
        change = _Change(where, document, "created")
    elif document_of(current) == document:
        return _Change(where, document, "unchanged")
    else:
        change = _Change(where, document, "configured", current.etag)
    _carry_out(client, change, validate_only=True)
    return change


def _carry_out(client: Client, change: _Change, *, validate_only: bool) -> None:
    document = change.document
    fields: dict[str, Any] = {
        name: getattr(document, name)
        for name in ("interventions", "max_dose", "description", "annotations", "expire_time")
    }
    try:
        if change.result == "created":
            client.create_policy(document.name, validate_only=validate_only, **fields)
        elif change.result == "configured":
            etag = change.etag
            client.update_policy(document.name, etag=etag, validate_only=validate_only, **fields)
    except SpecError as error:
        field = error.field.removeprefix("policy.")
        raise ConfigError(f"{change.where}: {field}: {error.reason}") from None
    except SteerscopeError as error:
        raise ConfigError(f"{change.where}: {error}") from error


def _current(client: Client, name: str) -> steering_pb2.Policy | None:
    import grpc

    from steerscope.client import CallError

    try:
        return client.get_policy(name)
    except CallError as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return None
        raise


def _show_changes(done: Sequence[_Change], arguments: argparse.Namespace) -> None:
    if arguments.output is not Format.TABLE:
        rows = [{"name": change.document.name, "result": change.result} for change in done]
        show(rows, arguments.output)
        return
    note = " (dry run)" if arguments.dry_run else ""
    for change in done:
        print(f"policy/{change.document.name} {change.result}{note}")


def _get(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        if arguments.name is None:
            if arguments.revision:
                raise ConfigError("--revision: needs a NAME")
            _show(client.list_policies(arguments.filter), arguments.output)
        else:
            found = client.get_policy(arguments.name, arguments.revision)
            _show([found], arguments.output, is_one=True)
    return 0


def _revisions(arguments: argparse.Namespace) -> int:
    from steerscope.cli.documents import status_of

    with connected(arguments) as client:
        found = client.list_policy_revisions(arguments.name)
    if arguments.output is not Format.TABLE:
        _show(found, arguments.output)
        return 0
    rows = []
    for policy in found:
        status = status_of(policy)
        rows.append(
            (status.get("revision_id", ""), status.get("update_time", ""), *_content(policy))
        )
    show_table(("REVISION", "TIME", "EDITS", "MAX DOSE", "DESCRIPTION"), rows)
    return 0


def _show(policies: Sequence[steering_pb2.Policy], how: Format, *, is_one: bool = False) -> None:
    from steerscope.api.v1 import steering_pb2
    from steerscope.cli.documents import document_of, status_of

    if how is not Format.TABLE:
        trees = [document_of(policy).tree | {"status": status_of(policy)} for policy in policies]
        show(trees[0] if is_one else trees, how)
        return
    rows = [
        (
            document_of(policy).name,
            word(steering_pb2.PolicyOrigin, policy.origin),
            word(steering_pb2.PolicyState, policy.state),
            document_of(policy).tree.get("expire_time", ""),
            *_content(policy),
        )
        for policy in policies
    ]
    header = ("NAME", "ORIGIN", "STATE", "EXPIRES", "EDITS", "MAX DOSE", "DESCRIPTION")
    show_table(header, rows)


def _content(policy: steering_pb2.Policy) -> tuple[str, str, str]:
    """What a policy does, in three cells."""
    from steerscope.cli.documents import document_of

    document = document_of(policy)
    edits = [f"{edit.feature} {edit.op} {edit.value:g}" for edit in document.interventions]
    more = len(edits) - MAX_EDITS_SHOWN
    told = ", ".join(edits[:MAX_EDITS_SHOWN]) + (f" and {more} more" if more > 0 else "")
    dose = "" if document.max_dose is None else f"{document.max_dose:g}"
    return told, dose, document.description.partition("\n")[0][:60]


def _diff(arguments: argparse.Namespace) -> int:
    from steerscope.cli.documents import document_of, read_policies

    documents = read_policies(arguments.file)
    changes: list[dict[str, str]] = []
    with connected(arguments) as client:
        for _, document in documents:
            current = _current(client, document.name)
            before = "" if current is None else yaml_text(document_of(current).tree)
            after = yaml_text(document.tree)
            if before != after:
                names = (f"hub/{document.name}", f"file/{document.name}")
                changes.append({"name": document.name, "diff": _unified(before, after, *names)})
    if arguments.output is not Format.TABLE:
        show(changes, arguments.output)
    else:
        print("".join(change["diff"] for change in changes), end="")
    return DIFFERENT if changes else 0


def _unified(before: str, after: str, old: str, new: str) -> str:
    lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, old, new))


def _delete(arguments: argparse.Namespace) -> int:
    if arguments.etag and len(arguments.names) > 1:
        raise ConfigError("--etag: is of one policy, so give one NAME")
    done: list[str] = []
    with connected(arguments) as client:
        for name in arguments.names:
            client.delete_policy(name, etag=arguments.etag, validate_only=True)
        try:
            for name in dict.fromkeys(arguments.names):
                client.delete_policy(name, etag=arguments.etag)
                done.append(name)
        finally:
            if arguments.output is not Format.TABLE:
                show([{"name": name, "result": "deleted"} for name in done], arguments.output)
            else:
                print("".join(f"policy/{name} deleted\n" for name in done), end="")
    return 0
