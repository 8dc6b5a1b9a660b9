"""A linear probe: ``weight`` [1, D] or [D] and ``bias``, as hallucination probes have them.

Its value is the logit x @ weight + bias. Beside the file there may be a ``probe_config.json`` or
``config.json`` with ``layer_idx`` (or ``layer``) and ``site``; without a site, the probe looks at
what the layer puts out. Read-only: what predicts need not be what causes, so a probe's weight is
not offered as a direction to write; import it as one (``directions``) to try that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from steerscope.catalog.formats import directions, foreign, hooks
from steerscope.catalog.formats.source import Columns, Held, Options, Source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError

CONFIGS = ("probe_config.json", "config.json")


class Config(msgspec.Struct, frozen=True):
    """What may stand beside the file."""

    layer_idx: int | None = None
    layer: int | None = None
    site: Site | None = None
    probe_id: str | None = None
    model_name: str | None = None


@contextmanager
def open_file(path: Path, options: Options) -> Iterator[Source]:
    """The probe in the file, or in the only safetensors file of the folder."""
    file = _file(path)
    config = _config(file.parent)
    layer = config.layer_idx if config.layer_idx is not None else config.layer
    with TensorFile(file) as tensors:
        weight_1D = directions.vector(tensors, "weight")[None]
        if math.prod(tensors.entry("bias").shape) != 1:
            raise CatalogError(f"{file}: 'bias' is not one number: a probe has one output")
        bias_1 = tensors.read("bias").reshape(1)
    told = {"probe_id": config.probe_id, "model_name": config.model_name}
    yield Source(
        kind=FeatureKind.PROBE,
        site=hooks.agreed("site", config.site, options.site or config.site or Site.RESID_POST),
        layer=hooks.agreed("layer", layer, options.layer),
        d_in=weight_1D.size,
        d_sae=1,
        activation=Activation.IDENTITY,
        weights=Held(Columns(np.ascontiguousarray(weight_1D), bias_1, None, None)),
        provenance={key: value for key, value in told.items() if value},
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise CatalogError(f"{path}: {len(files)} safetensors files, expected one; name it")
    return files[0]


def _config(folder: Path) -> Config:
    for name in CONFIGS:
        if (folder / name).exists():
            return foreign.read(folder / name, Config)
    return Config()
