"""repeng's control vectors: GGUF files with a tensor ``direction.<layer>`` [D] for each layer.

Read against repeng 0.4: ``ControlModule.forward`` adds ``coeff * direction.<i>`` to the output of
decoder layer ``i`` (counted from 0), and they are trained on ``hidden_states[i + 1]``, which is the
same: ``resid_post`` of layer ``i``. So ``add: coeff`` here is ``set_control(vector, coeff)`` there,
at every token. Its ``normalize`` option depends on the token and has no equivalent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steerscope.catalog.formats import hooks
from steerscope.catalog.formats.directions import vector
from steerscope.catalog.formats.gguf import GgufFile
from steerscope.catalog.formats.source import Options, Source, directions
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

ARCHITECTURE = "controlvector"
PREFIX = "direction."
TOLD = "general.architecture"


@contextmanager
def open_layer(path: Path, options: Options) -> Iterator[Source]:
    """The direction of ``options.layer``."""
    if options.layer is None:
        raise CatalogError(f"{path}: which layer? name features as NAME=LAYER")
    name = f"{PREFIX}{options.layer}"
    with GgufFile(path) as tensors:
        if (told := tensors.metadata.get(TOLD, "")) != ARCHITECTURE:
            raise CatalogError(f"{path}: {TOLD} is {told!r}, expected {ARCHITECTURE!r}")
        if name not in tensors.entries:
            layers = (n.removeprefix(PREFIX) for n in tensors.entries if n.startswith(PREFIX))
            raise CatalogError(f"{path}: no {name}; there are layers {', '.join(layers)}")
        vector_D = vector(tensors, name)
    yield Source(
        kind=FeatureKind.DIRECTION,
        site=hooks.agreed("site", Site.RESID_POST, options.site),
        layer=options.layer,
        d_in=vector_D.size,
        d_sae=1,
        activation=Activation.IDENTITY,
        weights=directions(vector_D[None]),
        provenance={"model_hint": tensors.metadata.get(f"{ARCHITECTURE}.model_hint", "")},
    )
