"""What operators and researchers bring as files: settings, identities, catalogs, weights."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fuzz_world import catalog, refused, written
from steerscope import config as configs
from steerscope import security
from steerscope.catalog import store
from steerscope.catalog.formats import Options, attribution_graph, open_source
from steerscope.catalog.formats.npz import NpzFile
from steerscope.catalog.model import Site
from steerscope.catalog.modelfolder import ModelFolder
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError, ConfigError
from steerscope.hub.conversions import policy_message
from steerscope.hub.policies import Origin, declared_policy
from steerscope.steering.policies import check_declared

ANYWHERE = Options(site=Site.RESID_POST, layer=3)


def config(data: bytes) -> bool:
    """A config file, and its policies against the catalog."""
    path = written("config/steerscope.yaml", data)
    if not (path.parent / "catalog").exists():
        shutil.copytree(catalog().folder, path.parent / "catalog")
    try:
        settings = configs.load_file(path)
        check_declared(catalog(), settings)
    except ConfigError as error:
        return refused(error)
    for policy in settings.policies:
        policy_message(declared_policy(policy, Origin.CONFIG)).SerializeToString()
    tree = configs.to_tree(settings)
    assert all(math.isfinite(number) for number in numbers(tree))
    for name in names(tree):
        assert not name.endswith("\n"), name
    assert configs.from_tree(tree, base=path.parent, where="again") == settings
    return True


def identities(data: bytes) -> bool:
    """A file of identities, which the hub reads again whenever it changes."""
    try:
        read = security.read_identities(data, "identities.yaml")
        security.check_identities(read, security.Tls("c", "k", "ca"), "identities")
    except ConfigError as error:
        return refused(error)
    tree = msgspec.to_builtins(read)
    assert all(math.isfinite(number) for number in numbers(tree))
    for name in names(tree):
        assert not name.endswith("\n"), name
    return True


def catalog_yaml(data: bytes) -> bool:
    """A catalog's document, beside vectors that fit the small one."""
    path = written("catalog_yaml/catalog.yaml", data)
    tensors = path.with_name("features.safetensors")
    if not tensors.exists():
        shutil.copy(catalog().folder / "features.safetensors", tensors)
    return _loaded(path.parent)


def catalog_tensors(data: bytes) -> bool:
    """A catalog's vectors, beside the small one's document."""
    path = written("catalog_tensors/features.safetensors", data)
    document = path.with_name("catalog.yaml")
    if not document.exists():
        shutil.copy(catalog().folder / "catalog.yaml", document)
    return _loaded(path.parent)


def _loaded(path: Path) -> bool:
    try:
        loaded = store.load(path)
    except CatalogError as error:
        return refused(error)
    for vectors in loaded.vectors.values():
        assert np.isfinite(vectors.W_enc).all()
        assert math.isfinite(vectors.b_enc)
    tree = msgspec.to_builtins(loaded.document)
    for part in (*tree["features"], *tree["signals"]):
        part.pop("evidence", None)  # anyone's
    assert all(math.isfinite(number) for number in numbers(tree))
    del tree["name"]  # free text
    for name in names(tree):
        assert not name.endswith("\n"), name
    return True


def tensors(data: bytes) -> bool:
    """Any safetensors file: every way that something of it is read."""
    return _tensors(written("tensors.safetensors", data), TensorFile)


def npz(data: bytes) -> bool:
    """Any .npz file."""
    return _tensors(written("tensors.npz", data), NpzFile)


def _tensors(path: Path, kind: type[TensorFile]) -> bool:
    try:
        opened = kind(path)
    except CatalogError as error:
        return refused(error)
    with opened as file:
        for name, entry in file.entries.items():
            assert len(file.raw(name)) == entry.end - entry.begin
            for read in _reads(file, name):
                try:
                    read()
                except CatalogError as error:
                    refused(error)
    return True


def _reads(file: TensorFile, name: str) -> Iterator[Callable[[], object]]:
    yield functools.partial(file.read, name)
    yield functools.partial(file.is_finite, name)
    for indices in ([], [0], [1, 0]):
        yield functools.partial(file.rows, name, indices)
        yield functools.partial(file.columns, name, indices)


def directions(data: bytes) -> bool:
    """A safetensors file of directions."""
    return _source("directions", written("directions.safetensors", data))


def linear_probe(data: bytes) -> bool:
    """A safetensors file with a probe."""
    return _source("linear-probe", written("probe/probe.safetensors", data))


def gguf(data: bytes) -> bool:
    """A control vector."""
    return _source("repeng", written("vector.gguf", data))


def _source(format: str, path: Path, options: Options = ANYWHERE) -> bool:
    try:
        with open_source(format, path, options) as source:
            columns = source.columns(range(min(source.d_sae, 2)))
    except CatalogError as error:
        return refused(error)
    assert columns.W_enc.shape[1] == source.d_in
    return True


def dictionary_config(data: bytes) -> bool:
    """The small file beside the weights, of each format that has one."""
    accepted = False
    for format, file in (
        ("saelens", "cfg.json"),
        ("sparsify", "cfg.json"),
        ("circuit-tracer", "config.yaml"),
        ("linear-probe", "probe_config.json"),
    ):
        path = written(f"{format}/{file}", data).parent
        _write_weights(path)
        accepted |= _source(format, path if format != "linear-probe" else path / "p.safetensors")
    return accepted


@functools.cache
def _write_weights(path: Path) -> None:
    from safetensors.numpy import save_file

    wide, latents = np.eye(3, 4, dtype=np.float32), np.ones(4, np.float32)
    plain = {"W_enc": wide, "b_enc": latents, "W_dec": wide.T.copy(), "b_dec": latents[:3]}
    save_file(plain, path / "sae_weights.safetensors")
    rows = {"encoder.weight": wide.T.copy(), "encoder.bias": latents, "b_dec": latents[:3]}
    save_file(rows | {"W_dec": wide.T.copy()}, path / "sae.safetensors")
    save_file(plain | {"W_enc": wide.T.copy()}, path / "layer_3.safetensors")
    save_file({"weight": latents, "bias": latents[:1]}, path / "p.safetensors")


def graph(data: bytes) -> bool:
    """An attribution graph that someone saved."""
    path = written("graph.json", data)
    try:
        found = list(attribution_graph.pinned(attribution_graph.read(path)))
    except CatalogError as error:
        return refused(error)
    return bool(found)


def model(data: bytes) -> bool:
    """A model's ``config.json``, beside weights of two layers."""
    path = written("model/config.json", data).parent
    if not (path / "model.safetensors").exists():
        _write_model(path / "model.safetensors")
    try:
        read = ModelFolder.read(path)
        read.multiplications()
        read.telling_tensors()
        read.mlp_norm(1)
    except CatalogError as error:
        return refused(error)
    return True


def _write_model(path: Path) -> None:
    from safetensors.numpy import save_file

    weights = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for layer in (0, 1):
        weights[f"model.layers.{layer}.input_layernorm.weight"] = (4,)
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"] = (4,)
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
    save_file({name: np.ones(shape, np.float32) for name, shape in weights.items()}, path)


def numbers(tree: Any) -> Iterator[float]:
    """Every float in it."""
    if isinstance(tree, float):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from numbers(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from numbers(part)


def names(tree: Any) -> Iterator[str]:
    """Every ``name`` in it: labels of metrics, and parts of resource names."""
    if isinstance(tree, dict):
        if isinstance(tree.get("name"), str):
            yield tree["name"]
        for part in tree.values():
            yield from names(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from names(part)
