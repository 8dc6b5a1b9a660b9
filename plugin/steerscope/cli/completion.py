"""``steerscope completion``: what a shell needs to complete the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from steerscope.errors import SteerscopeError

SHELLS = ("bash", "zsh", "fish")


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    whole: Callable[[], argparse.ArgumentParser],
) -> None:
    """Add ``completion``; ``whole`` makes the main command's parser."""
    parser = commands.add_parser(
        "completion",
        help="print completions for a shell",
        description='bash: eval "$(steerscope completion bash)". zsh: write it to _steerscope in a '
        "folder of $fpath. fish: write it to ~/.config/fish/completions/steerscope.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=lambda arguments, _: _print(whole(), arguments.shell))


def _print(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        raise SteerscopeError("completion: needs shtab (pip install shtab)") from None
    _mark_files(parser, shtab.FILE)
    print(shtab.complete(parser, shell=shell))
    return 0


def _mark_files(parser: argparse.ArgumentParser, file: object) -> None:
    """Complete paths where a path is asked for."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _mark_files(part, file)
        elif action.type is Path or action.dest == "file":
            action.complete = file  # type: ignore[attr-defined]
