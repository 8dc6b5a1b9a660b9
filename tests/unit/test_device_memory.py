"""What a worker's sites take on the device: the formula of docs/operating.md, byte by byte."""

import gc

import oracle
import pytest
import torch
from steerscope.catalog import store
from steerscope.engine.taps import SiteTap, StepRows

META = torch.device("meta")
"""Tensors there have sizes and no memory, and host and device are told apart as on a GPU."""


def device_bytes(width, num_features, num_places, num_rows, max_num_tokens):
    """One site."""
    vectors = 4 * width * num_features * (1 + num_places) + (8 + num_places) * num_features
    rows = num_rows * (36 * num_features + 4)
    buffers = max_num_tokens * (8 * num_features + 4) + 4 * width
    return vectors + rows + buffers


def on_device():
    """Bytes of each storage there."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == META)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(oracle.world(tmp_path_factory.mktemp("world")).catalog)


@pytest.mark.parametrize(("num_rows", "max_num_tokens"), [(5, 16), (1025, 8192)])
def test_the_bytes_on_the_device_are_those_of_the_formula(catalog, num_rows, max_num_tokens):
    before = on_device()
    step = StepRows(max_num_tokens, META)
    taps = [SiteTap(catalog, key, step, num_rows, META) for key in catalog.sites]
    places = [len({feature.writes for feature in tap.features}) for tap in taps]
    assert set(places) == {1, 2}
    expected = 8 * max_num_tokens + sum(
        device_bytes(128, len(tap.features), num_places, num_rows, max_num_tokens)
        for tap, num_places in zip(taps, places, strict=True)
    )
    assert on_device() - before == expected
