"""``steerscope rules`` and ``kill-switch``: what governs requests beside what they ask for."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from steerscope.cli.connection import NotThereError, connected
from steerscope.cli.output import Format, clean, show, show_table
from steerscope.errors import ConfigError

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.client.rules import RulesChange, RulesInForce
    from steerscope.steering.rules import Binding, Override

NOT_ALL = 1
"""``kill-switch`` ends with this if a running request could not be changed."""


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``rules`` and ``kill-switch`` to the main command."""
    parser = commands.add_parser("rules", help="the default policy and bindings")
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = parts.add_parser(name, help=help, parents=[options])
        made.set_defaults(run=lambda arguments, _: run(arguments))
        return made

    part("get", _get, "the rules in force")
    default = part("set-default", _set_default, "what requests get that ask for nothing")
    which = default.add_mutually_exclusive_group(required=True)
    which.add_argument("policy", nargs="?", metavar="POLICY")
    which.add_argument("--none", action="store_true", help="they are not steered")
    _add_bind(part("bind", _bind, "bind requests to a policy, whatever they ask for"))
    part("unbind", _unbind, "remove a binding").add_argument("binding", metavar="BINDING")
    apply = part("apply", _apply, "the default and all bindings, from a file")
    apply.add_argument("-f", "--file", required=True, help="YAML or JSON; - is stdin")
    apply.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    _add_kill_switch(commands, options)


def _add_bind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("binding", metavar="BINDING", help="its name; one of that name is replaced")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--policy", help="what they are steered by")
    to.add_argument("--unsteered", action="store_true", help="they are not steered")
    for name in ("model", "lora", "identity"):
        parser.add_argument(f"--{name}", default="", help=f"requests of that {name}")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="requests with that HTTP header; may be given again",
    )
    parser.add_argument("--first", action="store_true", help="tried before all others")


def _add_kill_switch(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    parser = commands.add_parser(
        "kill-switch",
        help="end all steering at once, or force one policy on everything",
        description="on: nothing is steered. force POLICY: everything is, by that policy. off: "
        "neither any more. Without any: what holds. Ends with 1 if a running request could not "
        "be changed.",
        parents=[options],
    )
    parser.add_argument("switch", nargs="?", choices=("on", "off", "force"), help="what to do")
    parser.add_argument("policy", nargs="?", metavar="POLICY", help="with force")
    parser.add_argument("--reason", default="", help="a text for people")
    parser.set_defaults(run=lambda arguments, _: _kill_switch(arguments))


def _get(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        _show(client.get_rules(), arguments.output)
    return 0


def _set_default(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        _show(client.update_rules(default_policy=arguments.policy).in_force, arguments.output)
    return 0


def _bind(arguments: argparse.Namespace) -> int:
    from steerscope.steering.rules import Binding, Match

    match = Match(
        model=arguments.model,
        lora=arguments.lora,
        identity=arguments.identity,
        headers=dict(map(_header, arguments.header)),
    )
    made = Binding(name=arguments.binding, match=match, policy=arguments.policy)
    with connected(arguments) as client:
        now = client.get_rules()
        bindings = _with(made, list(now.rules.bindings), first=arguments.first)
        _show(client.update_rules(bindings=bindings, etag=now.etag).in_force, arguments.output)
    return 0


def _with(made: Binding, bindings: list[Binding], *, first: bool) -> list[Binding]:
    names = [binding.name for binding in bindings]
    if made.name in names and not first:
        bindings[names.index(made.name)] = made
        return bindings
    others = [binding for binding in bindings if binding.name != made.name]
    return [made, *others] if first else [*others, made]


def _unbind(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        now = client.get_rules()
        left = [binding for binding in now.rules.bindings if binding.name != arguments.binding]
        if len(left) == len(now.rules.bindings):
            raise NotThereError(f"no binding {arguments.binding!r}")
        _show(client.update_rules(bindings=left, etag=now.etag).in_force, arguments.output)
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from steerscope.cli.documents import read_rules

    rules = read_rules(arguments.file)
    with connected(arguments) as client:
        change = client.update_rules(
            default_policy=rules.default_policy,
            bindings=rules.bindings,
            etag=client.get_rules().etag,
            validate_only=arguments.dry_run,
        )
    _show(change.in_force, arguments.output)
    return 0


def _kill_switch(arguments: argparse.Namespace) -> int:
    if (arguments.switch == "force") != (arguments.policy is not None):
        raise ConfigError("kill-switch: force, and only force, takes a POLICY")
    if arguments.reason and arguments.switch not in ("on", "force"):
        raise ConfigError("--reason: is for on and force")
    with connected(arguments) as client:
        if arguments.switch is None:
            _show_switch(client.get_rules(), arguments.output)
            return 0
        change = client.update_rules(override=_override(arguments))
    _show_switch(change.in_force, arguments.output, change)
    for request_id, reason in change.declined.items():
        print(
            f"steerscope: {clean(request_id)} goes on as it was: {clean(reason)}", file=sys.stderr
        )
    return NOT_ALL if change.declined else 0


def _override(arguments: argparse.Namespace) -> Override | None:
    from steerscope.steering.rules import Override, OverrideMode

    if arguments.switch == "off":
        return None
    mode = OverrideMode.OFF if arguments.switch == "on" else OverrideMode.FORCE
    return Override(mode=mode, policy=arguments.policy, reason=arguments.reason)


def _show_switch(in_force: RulesInForce, how: Format, change: RulesChange | None = None) -> None:
    import msgspec

    override = in_force.rules.override
    if how is not Format.TABLE:
        tree: dict[str, object] = {"override": msgspec.to_builtins(override)}
        if change is not None:
            tree |= {"changed": dict(change.changed), "declined": dict(change.declined)}
        show(tree, how)
        return
    print(f"kill switch {_told(override)}")
    if change is not None:
        for request_id, position in change.changed.items():
            print(f"  {clean(request_id)} from token {position}")


def _told(override: Override | None) -> str:
    if override is None:
        return "off"
    what = "on: nothing is steered"
    if override.policy is not None:
        what = f"force: everything is steered by {override.policy}"
    return what + (f" ({clean(override.reason)})" if override.reason else "")


def _show(in_force: RulesInForce, how: Format) -> None:
    import msgspec

    rules = in_force.rules
    if how is not Format.TABLE:
        status: dict[str, object] = {
            "override": msgspec.to_builtins(rules.override),
            "etag": in_force.etag,
            "update_time": in_force.update_time and in_force.update_time.isoformat(),
        }
        show(
            {
                "default_policy": rules.default_policy,
                "bindings": [_binding_tree(binding) for binding in rules.bindings],
                "status": {key: value for key, value in status.items() if value},
            },
            how,
        )
        return
    print(f"default      {rules.default_policy or 'not steered'}")
    print(f"kill switch  {_told(rules.override)}")
    rows = [(b.name, b.policy or "not steered", _matched(b)) for b in rules.bindings]
    if rows:
        print()
        show_table(("BINDING", "POLICY", "REQUESTS WITH"), rows)


def _binding_tree(binding: Binding) -> dict[str, object]:
    import msgspec

    tree: dict[str, Any] = msgspec.to_builtins(binding)
    return tree | {"match": {key: value for key, value in tree["match"].items() if value}}


def _matched(binding: Binding) -> str:
    match = binding.match
    plain = {"model": match.model, "lora": match.lora, "identity": match.identity}
    told = [f"{name}={value}" for name, value in plain.items() if value]
    return " ".join(told + [f"{name}: {value}" for name, value in match.headers.items()])


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--header: must be NAME=VALUE, got {text!r}")
    return name.lower(), value
