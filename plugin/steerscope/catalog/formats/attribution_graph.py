"""The features someone pinned in an attribution graph: JSON by circuit-tracer or Neuronpedia.

A feature's node has the id ``<layer>_<index>_<position>`` and, in ``feature``, layer and index
once more in one number (Cantor's pairing, circuit-tracer's ``frontend/graph_models.py``); a node
in which they differ is refused. A label that someone gave in the graph (``qParams.clerps``, or the
name of a supernode that holds the node) is a human's, a node's own ``clerp`` an automatic one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from steerscope.catalog.formats import foreign
from steerscope.catalog.model import LabelSource
from steerscope.errors import CatalogError

FEATURE = "cross layer transcoder"
"""``feature_type`` of every transcoder's node, per-layer ones too."""


class Node(msgspec.Struct, frozen=True):
    """A node, as far as it names a feature."""

    node_id: str
    feature: int | None
    layer: str
    feature_type: str
    clerp: str | None = ""


class Shown(msgspec.Struct, frozen=True):
    """``qParams``: what whoever saved the graph had picked and named."""

    pinnedIds: list[str] | str = []
    supernodes: list[list[str]] = []
    clerps: list[list[str]] = []


class Metadata(msgspec.Struct, frozen=True):
    """Where the graph comes from."""

    slug: str = ""
    scan: str | None = None


class Graph(msgspec.Struct, frozen=True):
    """The file."""

    nodes: list[Node]
    metadata: Metadata = Metadata()
    qParams: Shown = Shown()


@dataclass(frozen=True, slots=True)
class Pinned:
    """A feature of the graph."""

    layer: int
    index: int
    label: str
    label_source: LabelSource

    @property
    def name(self) -> str:
        """What it is called in a catalog unless someone names it."""
        return f"layer{self.layer}_{self.index}"


def read(path: Path) -> Graph:
    """Read the file; ``CatalogError`` names the field."""
    return foreign.read(path, Graph)


def pinned(graph: Graph) -> Iterator[Pinned]:
    """Every feature among the pinned nodes, once, whatever the positions it was pinned at."""
    ids = graph.qParams.pinnedIds
    seen: set[tuple[int, int]] = set()
    features = {node.node_id for node in graph.nodes if node.feature_type == FEATURE}
    for node_id in ids.split(",") if isinstance(ids, str) else ids:
        if node_id not in features:
            continue  # a token, an output or an error term
        found = find(graph, node_id)
        if (found.layer, found.index) not in seen:
            seen.add((found.layer, found.index))
            yield found


def find(graph: Graph, node_id: str) -> Pinned:
    """The feature of a node, or ``CatalogError``."""
    node = next((node for node in graph.nodes if node.node_id == node_id), None)
    if node is None:
        raise CatalogError(f"no node {node_id!r} in the graph")
    if node.feature_type != FEATURE:
        raise CatalogError(f"node {node_id!r} is no feature but {node.feature_type!r}")
    try:
        layer, index, _ = (int(part) for part in node_id.split("_"))
    except ValueError:
        raise CatalogError(f"node {node_id!r} is not named LAYER_INDEX_POSITION") from None
    if node.layer != str(layer) or node.feature != paired(layer, index):
        raise CatalogError(
            f"node {node_id!r} contradicts itself: layer {node.layer}, feature {node.feature}"
        )
    return Pinned(layer, index, *_label(graph, node))


def paired(layer: int, index: int) -> int:
    """Cantor's pairing of two natural numbers."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _label(graph: Graph, node: Node) -> tuple[str, LabelSource]:
    given = {entry[0]: entry[1] for entry in graph.qParams.clerps if len(entry) == 2}
    if node.node_id in given:
        return given[node.node_id], LabelSource.HUMAN
    for name, *members in (group for group in graph.qParams.supernodes if group):
        if node.node_id in members:
            return name, LabelSource.HUMAN
    return node.clerp or "", LabelSource.AUTOMATIC
