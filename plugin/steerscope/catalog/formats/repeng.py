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
from typing import Any

import numpy as np

from steerscope.catalog.formats import hooks
from steerscope.catalog.formats.source import Options, Source, directions
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

ARCHITECTURE = "controlvector"
PREFIX = "direction."


@contextmanager
def open_layer(path: Path, options: Options) -> Iterator[Source]:
    """The direction of ``options.layer``."""
    if options.layer is None:
        raise CatalogError(f"{path}: which layer? name features as NAME=LAYER")
    reader = _reader(path)
    name = f"{PREFIX}{options.layer}"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if name not in tensors:
        known = ", ".join(n.removeprefix(PREFIX) for n in tensors if n.startswith(PREFIX))
        raise CatalogError(f"{path}: no {name}; there are layers {known}")
    vector_D = _vector(path, tensors[name])
    yield Source(
        kind=FeatureKind.DIRECTION,
        site=hooks.agreed("site", Site.RESID_POST, options.site),
        layer=options.layer,
        d_in=vector_D.size,
        d_sae=1,
        activation=Activation.IDENTITY,
        weights=directions(vector_D[None]),
        provenance={"model_hint": _text(reader, f"{ARCHITECTURE}.model_hint")},
    )


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CatalogError(
            "GGUF files are read with the gguf library: pip install 'steerscope[lab]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # on a malformed file it raises whatever numpy does
        raise CatalogError(f"{path}: not a GGUF file, or truncated: {error}") from None
    if (told := _text(reader, "general.architecture")) != ARCHITECTURE:
        raise CatalogError(f"{path}: general.architecture is {told!r}, expected {ARCHITECTURE!r}")
    return reader


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return bytes(field.parts[-1]).decode("utf-8", "replace") if field and field.parts else ""


def _vector(path: Path, tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    if tensor.tensor_type.name not in {"F32", "F16"} or tensor.data.ndim != 1:
        raise CatalogError(
            f"{path}: {tensor.name} is {tensor.tensor_type.name} {list(tensor.data.shape)}, "
            "expected one vector of floats"
        )
    return np.array(tensor.data, np.float32)
