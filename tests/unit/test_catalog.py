import dataclasses
import shutil

import msgspec
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from steerscope.catalog import fingerprint, store
from steerscope.catalog.modelfolder import ModelFolder
from steerscope.errors import CatalogError, ModelMismatchError, SpecError
from steerscope.steering.interventions import parse_spec


@pytest.fixture
def folder(tiny_world, tmp_path):
    return shutil.copytree(tiny_world.catalog, tmp_path / "catalog")


def change_yaml(folder, change):
    path = folder / store.CATALOG_FILE
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def change_tensors(folder, change):
    path = folder / store.TENSORS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_catalog_loads_with_its_features_grouped_by_site(folder):
    catalog = store.load(folder)
    assert [str(key) for key in catalog.sites] == ["resid_post.1", "resid_post.2"]
    assert catalog.feature("probe_2").layer == 2
    assert catalog.vectors["probe_2"].W_dec is None


def test_the_digest_changes_with_either_file(folder):
    before = store.load(folder).digest
    change_yaml(folder, lambda d: d.update(description="other"))
    after_yaml = store.load(folder).digest
    change_tensors(folder, lambda t: t.update({"unit_1.b_enc": np.array([9.0], np.float32)}))
    assert len({before, after_yaml, store.load(folder).digest}) == 3


def set_nan(tensors):
    tensors["unit_1.W_enc"][3] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("unit_1.W_enc"), "'unit_1.W_enc' is missing"),
        (lambda t: t.pop("latent_1.threshold"), "'latent_1.threshold' is missing"),
        (set_nan, "NaN"),
        (lambda t: t.update({"unit_1.W_enc": np.zeros(7, np.float32)}), "expected F32"),
        (lambda t: t.update({"unit_1.W_enc": np.zeros(128)}), "F64"),
        (lambda t: t.update({"stray": np.zeros(1, np.float32)}), "belongs to no feature"),
    ],
)
def test_bad_tensors_are_refused_by_name(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(CatalogError, match=message):
        store.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="v0"), "schema"),
        (lambda d: d.update(extra=1), "unknown field `extra`"),
        (lambda d: d["features"][0].update(name="Bad Name"), r"features\[0\].name"),
        (lambda d: d["features"][0].update(layer=99), "layer 99 does not exist"),
        (lambda d: d["features"][0].update(site="nowhere"), r"features\[0\].site"),
        (lambda d: d["features"].append(d["features"][0]), "declared 2 times"),
        (lambda d: d["signals"][0]["terms"][0].update(feature="nope"), "no feature 'nope'"),
        (lambda d: d["signals"][0].update(bias=float("nan")), "not a finite number"),
        (lambda d: d["signals"][0].update(labels=[]), "labels"),
        (
            lambda d: d["policies"][0]["interventions"][0].update(feature="probe_1"),
            "policy 'push': interventions.0..feature: 'probe_1' is read-only",
        ),
    ],
)
def test_a_bad_document_is_refused_with_its_path(folder, change, message):
    change_yaml(folder, change)
    with pytest.raises(CatalogError, match=message):
        store.load(folder)


def test_truncated_and_missing_files_are_refused(folder, tmp_path):
    tensors = folder / store.TENSORS_FILE
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CatalogError, match=store.TENSORS_FILE):
        store.load(folder)
    with pytest.raises(CatalogError, match="No such file"):
        store.load(tmp_path / "nothing")


def test_yaml_cannot_construct_objects(folder):
    path = folder / store.CATALOG_FILE
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(CatalogError):
        store.load(folder)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        ('{"feature": "nope", "clamp": 1}', "interventions[0].feature"),
        ('{"feature": "probe_1", "clamp": 1}', "interventions[0].feature"),
        (
            '{"feature": "unit_1", "clamp": 1, "when": {"feature": "nope", "above": 0}}',
            "interventions[0].when.feature",
        ),
        (
            '{"feature": "unit_1", "clamp": 1, "when": {"feature": "unit_2", "above": 0}}',
            "interventions[0].when.feature",
        ),
    ],
)
def test_a_spec_is_checked_against_the_features_there_are(tiny_world, edit, field):
    catalog = store.load(tiny_world.catalog)
    with pytest.raises(SpecError) as caught:
        catalog.check(parse_spec(f'{{"interventions": [{edit}]}}'))
    assert caught.value.field == field


def test_the_model_it_was_made_for_is_accepted_and_others_are_refused(tiny_world, tmp_path):
    import tiny

    expected = store.load(tiny_world.catalog).document.model
    found = fingerprint.check(expected, ModelFolder.read(tiny_world.model).as_served())
    assert (found.match, found.differences, found.unchecked) == ("exact", (), ())
    other = ModelFolder.read(tiny.write_model(tmp_path / "other", seed=5)).as_served()
    with pytest.raises(ModelMismatchError, match=r"weight lm_head\.weight has sha256"):
        fingerprint.check(expected, other)
    wider = dataclasses.replace(ModelFolder.read(tiny_world.model).as_served(), hidden_size=256)
    with pytest.raises(ModelMismatchError, match="hidden_size is 256"):
        fingerprint.check(expected, wider)


def test_a_fine_tune_is_served_only_where_that_is_allowed_and_is_told_apart(tiny_world):
    served = ModelFolder.read(tiny_world.model).as_served()
    base = store.load(tiny_world.catalog).document.model
    expected = msgspec.structs.replace(base, weights={"lm_head.weight": "0" * 64})
    with pytest.raises(ModelMismatchError, match=r"lm_head\.weight has sha256 .*allow_fine_tune"):
        fingerprint.check(expected, served)
    found = fingerprint.check(expected, served, allow_fine_tune=True)
    assert found.match == "fine_tune"
    assert "lm_head.weight" in found.differences[0]
    deeper = msgspec.structs.replace(base, num_hidden_layers=9)
    with pytest.raises(ModelMismatchError, match="num_hidden_layers is 4"):
        fingerprint.check(deeper, served, allow_fine_tune=True)


def test_a_model_that_is_not_on_disk_is_unverified_and_says_what_was_not_compared(tiny_world):
    served = dataclasses.replace(ModelFolder.read(tiny_world.model).as_served(), folder=None)
    found = fingerprint.check(store.load(tiny_world.catalog).document.model, served)
    assert (found.match, found.unchecked) == ("unverified", ("tokenizer", "lm_head.weight"))


def test_a_file_that_links_out_of_the_folder_is_refused(folder, tmp_path):
    shutil.move(folder / store.TENSORS_FILE, tmp_path / "elsewhere")
    (folder / store.TENSORS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CatalogError, match="leads out of the catalog's folder"):
        store.load(folder)


def test_a_file_that_links_within_the_folder_as_config_maps_do_is_read(folder):
    (folder / "..data").mkdir()
    shutil.move(folder / store.TENSORS_FILE, folder / "..data" / store.TENSORS_FILE)
    (folder / store.TENSORS_FILE).symlink_to("..data/" + store.TENSORS_FILE)
    assert store.load(folder).vectors
