"""``steerscope features``: what the serving process can read, and what of it can be steered."""

from __future__ import annotations

import argparse

from steerscope.cli.connection import connected
from steerscope.cli.output import Format, show, show_table, tree_of, word


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``features`` to the main command."""
    parser = commands.add_parser("features", help="features in force", parents=[options])
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them, with all it has")
    parser.add_argument("--filter", default="", help="of all, e.g. 'steerable = true'")
    parser.set_defaults(run=lambda arguments, _: _features(arguments))


def _features(arguments: argparse.Namespace) -> int:
    from steerscope.api.v1 import catalog_pb2
    from steerscope.hub.conversions import FEATURES

    with connected(arguments) as client:
        if arguments.name is not None:
            feature = client.get_feature(arguments.name)
            how = Format.YAML if arguments.output is Format.TABLE else arguments.output
            show(tree_of(feature), how)
            return 0
        found = client.list_features(arguments.filter)
    if arguments.output is not Format.TABLE:
        show([tree_of(feature) for feature in found], arguments.output)
        return 0
    rows = [
        (
            feature.name.removeprefix(FEATURES),
            word(catalog_pb2.FeatureKind, feature.kind),
            f"{word(catalog_pb2.Site, feature.site)}.{feature.layer}",
            "yes" if feature.steerable else "no",
            feature.label,
        )
        for feature in found
    ]
    show_table(("NAME", "KIND", "SITE", "STEERABLE", "LABEL"), rows)
    return 0
