"""``steerscope token``: bearer tokens for the hub's identities."""

from __future__ import annotations

import argparse
import sys


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``token new`` and ``token hash``."""
    token = commands.add_parser("token", help="make a bearer token, or hash one")
    parts = token.add_subparsers(required=True, metavar="PART")
    parts.add_parser(
        "new",
        help="print a new token, which is kept nowhere, and its hash for token_sha256",
    ).set_defaults(run=_new)
    parts.add_parser(
        "hash",
        help="read a token on stdin, so that no list of processes shows it; print its hash",
    ).set_defaults(run=_hash)


def _new(arguments: argparse.Namespace, _: list[str]) -> int:
    from steerscope.hub.auth import tokens

    made = tokens.new_token()
    print(f"token:        {made.token}\ntoken_sha256: {made.sha256}")
    return 0


def _hash(arguments: argparse.Namespace, _: list[str]) -> int:
    from steerscope.hub.auth import tokens

    print(tokens.checked_sha256(sys.stdin.readline().strip()))
    return 0
