"""``steerscope steer`` and ``release``: one request, while it runs or before it comes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from steerscope.cli.connection import connected
from steerscope.cli.output import Format, clean, show, tree_of, word

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.api.v1 import steering_pb2


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``steer`` and ``release`` to the main command."""
    steer = commands.add_parser(
        "steer", help="steer a request from its next token on", parents=[options]
    )
    steer.add_argument("request", metavar="REQUEST", help="its id in the response, or to come")
    how = steer.add_mutually_exclusive_group(required=True)
    how.add_argument("--policy", default="", help="a policy's name")
    how.add_argument(
        "--interventions", metavar="JSON", help="""e.g. '[{"feature": "known", "clamp": 6.0}]'"""
    )
    steer.add_argument("--max-dose", type=float, help="caps the dose; with --interventions")
    steer.add_argument("--ttl", type=float, metavar="S", help="to wait for it (default 60)")
    steer.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    steer.set_defaults(run=lambda arguments, _: _steer(arguments))
    release = commands.add_parser("release", help="end a request's steering", parents=[options])
    release.add_argument("request", metavar="REQUEST")
    release.set_defaults(run=lambda arguments, _: _release(arguments))


def plain_request(name: str) -> str:
    """A request's id, also where it is given as a resource name."""
    return name.removeprefix("requests/")


def _steer(arguments: argparse.Namespace) -> int:
    from steerscope.api.v1 import steering_pb2
    from steerscope.cli.documents import read_edits

    asked = arguments.interventions
    edits = [] if asked is None else read_edits(asked, "--interventions")
    with connected(arguments) as client:
        answer = client.steer_request(
            plain_request(arguments.request),
            policy=arguments.policy,
            interventions=edits,
            max_dose=arguments.max_dose,
            ttl=arguments.ttl,
            validate_only=arguments.dry_run,
        )
    if arguments.output is not Format.TABLE:
        show(tree_of(answer), arguments.output)
        return 0
    state = (
        "accepted (dry run)" if arguments.dry_run else word(steering_pb2.SteerState, answer.state)
    )
    print(f"request/{clean(plain_request(arguments.request))} {state}")
    if answer.HasField("expire_time"):
        print(f"  waits for the request until {answer.expire_time.ToJsonString()}")
    _show_sequences(answer.sequences, "steered")
    print(f"  digest {answer.steering_digest}")
    return 0


def _release(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        sequences = client.release_request(plain_request(arguments.request))
    if arguments.output is not Format.TABLE:
        show({"sequences": [tree_of(each) for each in sequences]}, arguments.output)
        return 0
    print(f"request/{clean(plain_request(arguments.request))} released")
    _show_sequences(sequences, "free")
    return 0


def _show_sequences(sequences: Iterable[steering_pb2.SteeredSequence], what: str) -> None:
    for each in sequences:
        print(f"  {clean(each.request_id)} {what} from token {each.first_position}")
