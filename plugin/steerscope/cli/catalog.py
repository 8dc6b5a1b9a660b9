"""``steerscope catalog``: make catalogs of published features, look at them, compare them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscope.errors import CatalogError

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.catalog.importing import Draft, Pick
    from steerscope.catalog.model import Dictionary, Feature
    from steerscope.catalog.modelfolder import ModelFolder
    from steerscope.catalog.store import Catalog

DIFFERENT = 1
"""``diff`` ends with this if the catalogs differ, with 0 if not, with 2 if one cannot be read."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``catalog`` and its parts to the main command."""
    parser = commands.add_parser("catalog", help=__doc__.split(": ", 1)[1].rstrip("."))
    parts = parser.add_subparsers(required=True, metavar="PART")
    _add_import(parts.add_parser("import", help="features of a published SAE, probe, vector"))
    inspect = parts.add_parser("inspect", help="what is in a catalog, and what it costs")
    inspect.add_argument("catalog", type=Path)
    inspect.set_defaults(run=lambda arguments, _: _inspect(arguments.catalog))
    verify = parts.add_parser("verify", help="all checks; ends with 0, or 2 and what is wrong")
    verify.add_argument("catalog", type=Path)
    verify.add_argument("--model", type=Path, help="also compare with this model folder")
    verify.set_defaults(run=lambda arguments, _: _verify(arguments.catalog, arguments.model))
    merge = parts.add_parser("merge", help="one catalog of two for the same model")
    merge.add_argument("one", type=Path)
    merge.add_argument("other", type=Path)
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--name", help="of the new catalog; else both names, with a plus")
    merge.set_defaults(run=lambda arguments, _: _merge(arguments))
    diff = parts.add_parser("diff", help="what differs; ends with 1 if anything does, else 0")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)
    diff.set_defaults(run=lambda arguments, _: _diff(arguments.one, arguments.other))


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", help="saelens, gemma-scope, sparsify, ...; a wrong one lists all")
    parser.add_argument("path", type=Path)
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="NAME=INDEX",
        help="a latent, as LAYER/INDEX where there are several layers; may be given again",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model it is for")
    parser.add_argument("--out", type=Path, required=True, help="the catalog's folder")
    parser.add_argument("--append", action="store_true", help="add to the catalog that is there")
    parser.add_argument("--site", help="where the file does not say, e.g. resid_post")
    parser.add_argument("--layer", type=int, help="where the file does not say")
    parser.add_argument("--name", help="of the catalog; else the folder's")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME=TEXT", help="what a feature means"
    )
    parser.add_argument(
        "--graph",
        type=Path,
        help="circuit-tracer: an attribution graph; its pinned features, or --feature NAME=NODE_ID",
    )
    parser.set_defaults(run=lambda arguments, _: _import(arguments))


def _import(arguments: argparse.Namespace) -> int:
    from steerscope.catalog import authoring, fingerprint, store
    from steerscope.catalog.formats import FORMATS, Options
    from steerscope.catalog.importing import Draft
    from steerscope.catalog.modelfolder import ModelFolder

    if arguments.format not in FORMATS:
        raise CatalogError(f"no format {arguments.format!r}; there are {', '.join(FORMATS)}")
    base = store.load(arguments.out) if arguments.append else None
    if base is None and arguments.out.exists():
        raise CatalogError(f"{arguments.out}: exists already; --append adds to it")
    picks = _labelled(_picks(arguments), arguments.label)
    model = ModelFolder.read(arguments.model)
    if base is not None:
        fingerprint.check(base.document.model, model.as_served())
    draft = Draft(base.document.model if base else authoring.fingerprint_of(arguments.model), base)
    options = Options(
        site=_site(arguments.site),
        layer=arguments.layer,
        architecture=model.architecture,
        mlp_norm=model.mlp_norm,
    )
    with ExitStack() as stack:
        draft.take(stack, arguments.format, arguments.path, picks, options)
        catalog = draft.write(arguments.out, arguments.name)
    _print_import(catalog, draft, model)
    return 0


def _site(told: str | None) -> Any:
    from steerscope.catalog.model import Site

    if told is None:
        return None
    if told not in list(Site):
        raise CatalogError(f"--site {told!r}: expected one of {', '.join(Site)}")
    return Site(told)


def _picks(arguments: argparse.Namespace) -> list[Pick]:
    from steerscope.catalog.importing import Pick

    if arguments.graph is None:
        return [Pick.parse(told, arguments.format) for told in arguments.feature]
    if arguments.format != "circuit-tracer":
        raise CatalogError("--graph: only with the format circuit-tracer")
    return _graph_picks(arguments.graph, arguments.feature)


def _graph_picks(path: Path, features: Sequence[str]) -> list[Pick]:
    from steerscope.catalog.formats import attribution_graph
    from steerscope.catalog.importing import Pick

    graph = attribution_graph.read(path)
    if features:
        named = [told.partition("=")[::2] for told in features]
        chosen = [(name, attribution_graph.find(graph, node_id)) for name, node_id in named]
    else:
        chosen = [(pinned.name, pinned) for pinned in attribution_graph.pinned(graph)]
        if not chosen:
            raise CatalogError(f"{path}: no feature is pinned; say --feature NAME=NODE_ID")
    return [
        Pick(
            name=name,
            latent=str(pinned.index),
            layer=pinned.layer,
            label=pinned.label,
            label_source=pinned.label_source,
        )
        for name, pinned in chosen
    ]


def _labelled(picks: list[Pick], labels: Sequence[str]) -> list[Pick]:
    """The picks with the labels that were given, which are a human's."""
    from dataclasses import replace

    from steerscope.catalog.model import LabelSource

    given = {
        name: text for name, equals, text in (told.partition("=") for told in labels) if equals
    }
    if bad := [told for told in labels if "=" not in told]:
        raise CatalogError(f"--label {bad[0]!r}: expected NAME=TEXT")
    if stray := sorted(given.keys() - {pick.name for pick in picks}):
        raise CatalogError(f"--label {stray[0]!r}: no such feature is imported")
    return [
        replace(pick, label=given[pick.name], label_source=LabelSource.HUMAN)
        if pick.name in given
        else pick
        for pick in picks
    ]


def _print_import(catalog: Catalog, draft: Draft, model: ModelFolder) -> None:
    print(f"{catalog.folder}  {catalog.digest}")
    _print_columns([_feature_row(catalog, feature) for feature in draft.features])
    for dictionary in draft.added:
        print(f"dictionary {dictionary.name}: {_cost(dictionary, model.hidden_size)}")
        print(f"  the model itself: about {model.multiplications():,} multiply-adds a token")
    for note in draft.notes:
        print(f"note: {note}")


def _cost(dictionary: Dictionary, width: int) -> str:
    """Of evaluating all its latents, as TopK must."""
    each = dictionary.d_sae * width
    return f"{each:,} multiply-adds a token, {_megabytes(4 * each)}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _inspect(folder: Path) -> int:
    from steerscope.catalog import store

    catalog = store.load(folder)
    document = catalog.document
    model = document.model
    print(f"{document.name} {document.version}  {catalog.digest}")
    print(
        f"for {model.architecture}, {model.num_hidden_layers} layers of width {model.hidden_size}, "
        f"known again by {len(model.weights)} weights"
        + (" and the tokenizer" if model.tokenizer_sha256 else "")
    )
    if document.description:
        print(document.description)
    print()
    _print_columns(
        [("FEATURE", "SITE", "KIND", "ACTIVATION", "CAN", "EVIDENCE", "LABEL")]
        + [_feature_row(catalog, feature) for feature in document.features]
    )
    print()
    for title, lines in (
        (
            "signals",
            [f"{s.name} ({', '.join(t.feature for t in s.terms)})" for s in catalog.signals],
        ),
        ("policies", [f"{p.name} ({', '.join(_edited(p))})" for p in catalog.policies]),
        ("baselines", [f"{b.feature}, {b.phase}" for b in document.baselines]),
    ):
        print(f"{title:10} {'; '.join(lines) or '-'}")
    _print_size(catalog)
    return 0


def _edited(policy: Any) -> list[str]:
    return [intervention.feature for intervention in policy.interventions]


def _print_size(catalog: Catalog) -> None:
    from steerscope.catalog.store import CATALOG_FILE, TENSORS_FILE

    width = catalog.document.model.hidden_size
    sizes = [(catalog.folder / name).stat().st_size for name in (CATALOG_FILE, TENSORS_FILE)]
    single = [f for f in catalog.document.features if f.dictionary is None]
    written = sum(v.W_dec is not None for v in catalog.vectors.values())
    each = (len(single) + written) * width
    print(f"{'on disk':10} {_megabytes(sizes[0])} of YAML, {_megabytes(sizes[1])} of vectors")
    print(f"{'in graph':10} {each:,} multiply-adds a token if all are read and written")
    for dictionary in catalog.document.dictionaries:
        print(f"{'':10} {dictionary.name}, k={dictionary.k}: {_cost(dictionary, width)}")


def _feature_row(catalog: Catalog, feature: Feature) -> tuple[str, ...]:
    can = "read, steer" if catalog.vectors[feature.name].W_dec is not None else "read"
    return (
        feature.name,
        str(catalog.addresses[feature.name].key),
        feature.kind,
        feature.activation,
        can,
        _evidence(feature),
        feature.label,
    )


def _evidence(feature: Feature) -> str:
    """The first numbers it gives."""
    numbers = [(k, v) for k, v in feature.evidence.items() if isinstance(v, (int, float))]
    return " ".join(f"{key}={value:g}" for key, value in numbers[:2]) or "-"


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _verify(folder: Path, model: Path | None) -> int:
    from steerscope.catalog import fingerprint, store
    from steerscope.catalog.modelfolder import ModelFolder

    catalog = store.load(folder)
    if model is not None:
        fingerprint.check(catalog.document.model, ModelFolder.read(model).as_served())
    against = "" if model is None else f", and it is for {model}"
    print(f"{folder}: {len(catalog.vectors)} features are well formed{against}")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from steerscope.catalog import authoring, store

    one, other = store.load(arguments.one), store.load(arguments.other)
    name = arguments.name or f"{one.document.name}+{other.document.name}"
    document, encoders = authoring.merge(one, other, name)
    merged = authoring.write_catalog(arguments.out, document, one.vectors | other.vectors, encoders)
    print(f"{merged.folder}  {merged.digest}  {len(merged.vectors)} features")
    return 0


def _diff(one: Path, other: Path) -> int:
    from steerscope.catalog import store
    from steerscope.catalog.differences import differences

    lines = list(differences(store.load(one), store.load(other)))
    for line in lines:
        print(line)
    return DIFFERENT if lines else 0
