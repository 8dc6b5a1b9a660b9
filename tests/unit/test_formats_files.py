"""Files that are not what they should be: pickles, fragments, other things."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file
from steerscope.catalog.formats import FORMATS, Options, open_source
from steerscope.catalog.model import Site
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError

AT = Options(site=Site.RESID_POST, layer=2)


class Bomb:
    """Says so if someone unpickles it."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def zipped_pickle():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sae.pt", b""),
        ("probe_head.bin", pickle.dumps(Bomb())),
        ("sae.safetensors", pickle.dumps(Bomb())),
        ("params.npz", zipped_pickle()),
        ("vector.gguf", zipped_pickle()),
    ],
)
def test_a_pickle_is_refused_by_whatever_name_with_what_to_do(tmp_path, format, name, content):
    (tmp_path / name).write_bytes(content)
    with (
        pytest.raises(CatalogError, match=r"is pickled.*safetensors\.torch\.save_file"),
        open_source(format, tmp_path / name, AT),
    ):
        pass


def test_a_folder_with_nothing_but_pickles_is_refused_as_that(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "ae.pt").write_bytes(zipped_pickle())
    with pytest.raises(CatalogError, match=r"ae\.pt: is pickled"), open_source("saelens", tmp_path):
        pass


def test_a_safetensors_file_whose_header_has_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", 640) + header.ljust(640) + np.float32([1, 2]).tobytes()
    assert content.startswith(b"\x80\x02"), "the magic of pickle protocol 2"
    (tmp_path / "v.safetensors").write_bytes(content)
    with open_source("directions", tmp_path / "v.safetensors", AT) as source:
        assert source.d_in == 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_path_that_is_not_there_and_an_empty_folder_are_refused(tmp_path, format):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CatalogError, match=str(path)), open_source(format, path, AT):
            pass


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path):
    with (
        pytest.raises(CatalogError, match="no format 'pt'; there are saelens"),
        open_source("pt", tmp_path),
    ):
        pass


WHOLE = save(
    {"a": np.ones(6, np.float32), "b": np.ones((2, 3), np.float16)}, {"site": "resid_post"}
)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(0, len(WHOLE) - 1))
def test_a_safetensors_file_cut_at_any_byte_is_refused(size, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(WHOLE[:size])
    with pytest.raises(CatalogError, match=r"cut\.safetensors"):
        TensorFile(path)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_a_safetensors_file_with_any_byte_changed_is_read_or_refused_never_worse(
    place, byte, tmp_path_factory
):
    content = bytearray(WHOLE)
    content[place] = byte
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content)
    told = None
    try:
        with TensorFile(path) as tensors:
            for name in tensors.entries:
                tensors.read(name)
    except CatalogError as error:
        told = str(error)
    assert told is None or "changed.safetensors" in told


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"3", b'"a"', b"[" * 4000, b"\xff\xfe{}", b'{"a": 3}', b'{"a": {}}',
        b'{"__metadata__": 3}',
        b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 8]}}',
    ],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CatalogError, match=r"odd\.safetensors"):
        TensorFile(path)


def test_columns_of_integers_and_of_vectors_are_refused_by_name(tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file({"i": np.ones((2, 2), np.int64), "v": np.ones(4, np.float32)}, path)
    with TensorFile(path) as tensors:
        for name in ("i", "v"):
            with pytest.raises(CatalogError, match=f"'{name}' is"):
                tensors.columns(name, [0])
            with pytest.raises(CatalogError, match=f"'{name}' is"):
                tensors.rows(name, [0])
