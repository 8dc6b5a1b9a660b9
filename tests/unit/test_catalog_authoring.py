"""What is written can be read, is equal, and is all there or not at all.

Shapes: D width, K latents of a dictionary.
"""

from __future__ import annotations

import dataclasses
import json
import os

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from steerscope.catalog import authoring, fingerprint, store
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    Baseline,
    Calibration,
    CatalogDocument,
    CatalogPolicy,
    Dictionary,
    Feature,
    FeatureKind,
    Fingerprint,
    Isotonic,
    Label,
    LabelSource,
    Platt,
    Reduction,
    Signal,
    Site,
    Span,
    Target,
    Term,
    Threshold,
)
from steerscope.catalog.modelfolder import ModelFolder
from steerscope.catalog.store import DictionaryVectors, FeatureVectors
from steerscope.demo import paths
from steerscope.errors import CatalogError, ModelMismatchError
from steerscope.steering.interventions import Intervention, Phase, When

D, LAYERS, K = 8, 4, 5000
MODEL = Fingerprint(architecture="Tiny", hidden_size=D, num_hidden_layers=LAYERS, vocab_size=16)


def feature(name, **keys):
    told = {"kind": FeatureKind.SAE_LATENT, "site": Site.RESID_POST, "layer": 1,
            "activation": Activation.RELU}  # fmt: skip
    return Feature(name=name, **told | keys)


def document(*features, **keys):
    told = {"schema": SCHEMA, "name": "made", "version": "1", "model": MODEL, "features": features}
    return CatalogDocument(**told | keys)


def vectors_of(doc, seed=0, steers=True):
    rng = np.random.default_rng(seed)

    def draw():
        return rng.normal(size=D).astype(np.float32)

    return {
        f.name: FeatureVectors(
            W_enc=draw(),
            b_enc=float(np.float32(rng.normal())),
            threshold=float(np.float32(0.5)) if f.activation is Activation.JUMPRELU else 0.0,
            W_dec=draw() if steers else None,
        )
        for f in doc.features
    }


def assert_equal_vectors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        for a, b in zip(
            dataclasses.astuple(one[name]), dataclasses.astuple(other[name]), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def everything():
    """A document in which every kind of struct occurs."""
    signal = Signal(
        name="risk",
        terms=(
            Term(feature="a", reduce=Reduction.LAST_ENTITY_TOKEN, weight=-0.1,
                 span=Span(feature="b", above=1e-7)),
            Term(feature="a", reduce=Reduction.MAX_FIRST_GENERATED, weight=1e22, first=3),
        ),
        bias=0.25,
        labels=(Label(label="low", below=0.5), Label(label="high")),
        predicts=Target(label="wrong", among="answered"),
        calibration=Calibration(
            map=Isotonic(z=(-1.0, 2.5), p=(0.0, 1.0)), num_cases=7, split="dev",
            thresholds=(Threshold(score=0.9, max_fpr=0.05, num_negatives=40),),
        ),
        evidence={"auroc": 0.9, "by": {"en": [0.1, None, True], "fr": "…"}},
    )  # fmt: skip
    other = Signal(
        name="plain", terms=(Term(feature="b", reduce=Reduction.MEAN_PROMPT, weight=1.0),),
        bias=0.0, labels=(Label(label="any"),),
        calibration=Calibration(map=Platt(scale=2.0, offset=-1.0), num_cases=3, split="dev"),
    )  # fmt: skip
    edits = (
        Intervention(feature="a", clamp=6.0, phase=Phase.PROMPT, when=When(feature="b", above=0.0)),
        Intervention(feature="b", ablate=True, only_if_active=True, span=(0, 4)),
    )
    return document(
        feature("a", label="who: it's", label_source=LabelSource.AUTOMATIC, source={"n": "007"}),
        feature("b", activation=Activation.JUMPRELU, description="a long text " * 30),
        signals=(signal, other),
        policies=(CatalogPolicy(name="force-a", interventions=edits, max_dose=0.5),),
        baselines=(
            Baseline(feature="a", phase="prompt", edges=(0.0, 1.0), shares=(0.5, 0.25, 0.25),
                     num_tokens=100),
        ),
        description="on: yes\n- no",
    )  # fmt: skip


def test_whatever_a_document_can_say_comes_back_equal(tmp_path):
    doc = everything()
    vectors = vectors_of(doc)
    written = authoring.write_catalog(tmp_path / "c", doc, vectors)
    read = store.load(tmp_path / "c")
    assert read.document == doc == written.document
    assert (read.digest, written.folder) == (written.digest, tmp_path / "c")
    assert_equal_vectors(read.vectors, vectors)


def test_writing_what_was_read_changes_nothing(tmp_path):
    first = authoring.write_catalog(tmp_path / "a", everything(), vectors_of(everything()))
    again = authoring.write_catalog(tmp_path / "b", first.document, first.vectors)
    assert again.digest == first.digest


def test_the_demos_catalog_survives_being_written(tmp_path):
    old = store.load(paths.CATALOG_DIR)
    encoders = {d.name: authoring.stored_encoder(old, d.name) for d in old.document.dictionaries}
    new = authoring.write_catalog(tmp_path / "c", old.document, old.vectors, encoders)
    assert new.document == old.document
    assert_equal_vectors(new.vectors, old.vectors)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)
trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(label=texts, description=texts, source=st.dictionaries(texts, texts), evidence=trees)
def test_any_text_and_any_evidence_survive(label, description, source, evidence):
    told = feature("a", label=label, description=description, source=source,
                   evidence={"tree": evidence})  # fmt: skip
    doc = document(told, name=label, description=description)
    decoded = msgspec.yaml.decode(authoring.to_yaml(doc), type=CatalogDocument)
    assert decoded == doc


def test_the_file_is_short_and_in_the_structs_order():
    text = authoring.to_yaml(document(feature("a", label="who"), feature("b")))
    assert text == (
        "schema: steerscope.catalog/v1\nname: made\nversion: '1'\nmodel:\n  architecture: Tiny\n"
        "  hidden_size: 8\n  num_hidden_layers: 4\n  vocab_size: 16\nfeatures:\n- name: a\n"
        "  kind: sae_latent\n  site: resid_post\n  layer: 1\n  activation: relu\n  label: who\n"
        "- name: b\n  kind: sae_latent\n  site: resid_post\n  layer: 1\n  activation: relu\n"
    )
    assert max(map(len, authoring.to_yaml(everything()).splitlines())) <= 110


def topk_document():
    told = Dictionary(name="all", site=Site.RESID_POST, layer=1, d_sae=K, k=3)
    keys = {"activation": Activation.TOPK, "dictionary": "all"}
    return document(
        feature("a", latent=7, **keys), feature("b", latent=K - 1, **keys), feature("c"),
        dictionaries=(told,),
    )  # fmt: skip


def blocks(W_enc_KD, b_enc_K, size=1999):
    for first in range(0, len(b_enc_K), size):
        yield DictionaryVectors(W_enc_KD[first : first + size], b_enc_K[first : first + size])


def test_a_dictionary_is_written_in_blocks_and_its_features_are_rows_of_it(tmp_path):
    rng = np.random.default_rng(0)
    W_enc_KD = rng.normal(size=(K, D)).astype(np.float32)
    b_enc_K = rng.normal(size=K).astype(np.float32)
    doc = topk_document()
    written = authoring.write_catalog(
        tmp_path / "c", doc, vectors_of(doc), {"all": blocks(W_enc_KD, b_enc_K)}
    )
    np.testing.assert_array_equal(written.vectors["b"].W_enc, W_enc_KD[-1])
    assert written.vectors["a"].b_enc == b_enc_K[7]
    tensors = load_file(tmp_path / "c" / store.TENSORS_FILE)  # the library reads it too
    np.testing.assert_array_equal(tensors["all.W_enc"], W_enc_KD)
    np.testing.assert_array_equal(tensors["all.b_enc"], b_enc_K)
    assert authoring.same_encoder(
        authoring.stored_encoder(written, "all"), authoring.stored_encoder(written, "all")
    )
    other = b_enc_K.copy()
    other[-1] += 1
    assert not authoring.same_encoder(
        authoring.stored_encoder(written, "all"), blocks(W_enc_KD, other, authoring.BLOCK_LATENTS)
    )


def nan_in(field):
    def change(vectors):
        spoilt = np.full(D, np.nan, np.float32) if field.startswith("W") else np.inf
        vectors["a"] = dataclasses.replace(vectors["a"], **{field: spoilt})

    return change


@pytest.mark.parametrize(
    ("doc", "change", "message"),
    [
        (document(feature("a")), nan_in("W_enc"), "'a.W_enc' holds NaN"),
        (document(feature("a")), nan_in("W_dec"), "'a.W_dec' holds NaN"),
        (document(feature("a")), nan_in("b_enc"), "'a.b_enc' holds NaN"),
        (document(feature("a"), feature("a")), None, "'a' is declared 2 times"),
        (document(feature("a", layer=9)), None, "layer 9 does not exist"),
        (document(feature("A b")), None, "features"),
        (document(), None, "must not be empty"),
        (document(feature("a")), lambda v: v.clear(), "feature 'a' has no vectors"),
        (document(feature("a")), lambda v: v.update(b=v["a"]), "vectors of feature 'b'"),
        (
            document(feature("a")),
            lambda v: v.update(a=dataclasses.replace(v["a"], W_enc=np.ones(D + 1, np.float32))),
            "expected F32",
        ),
        (
            document(
                feature("a"),
                policies=(
                    CatalogPolicy(name="p", interventions=(Intervention(feature="z", add=1.0),)),
                ),
            ),
            None,
            "no feature 'z'",
        ),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_on_any_error_nothing_is_written_and_nothing_is_changed(
    tmp_path, doc, change, message, existing
):
    folder = tmp_path / "here" / "c"
    if existing:
        good = document(feature("good"))
        authoring.write_catalog(folder, good, vectors_of(good))
    before = snapshot(tmp_path)
    vectors = vectors_of(doc)
    if change:
        change(vectors)
    with pytest.raises(CatalogError, match=message):
        authoring.write_catalog(folder, doc, vectors, overwrite=existing)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda W, b: blocks(W[:-1], b[:-1]), "does not fit"),
        (lambda W, b: blocks(np.vstack([W, W[:1]]), np.append(b, b[0])), "does not fit"),
        (lambda W, b: blocks(W[:, :-1], b), "does not fit"),
        (lambda W, b: blocks(np.where(W[9, 0] == W, np.nan, W).astype(np.float32), b), "NaN"),
        (lambda W, b: iter(()), "does not fit"),
    ],
)
def test_a_dictionary_that_is_not_as_declared_is_not_written(tmp_path, given, message):
    rng = np.random.default_rng(0)
    W_enc_KD = rng.normal(size=(K, D)).astype(np.float32)
    doc = topk_document()
    encoder = given(W_enc_KD, np.zeros(K, np.float32))
    with pytest.raises(CatalogError, match=message):
        authoring.write_catalog(tmp_path / "c", doc, vectors_of(doc), {"all": encoder})
    assert snapshot(tmp_path) == {}


def snapshot(folder):
    """Every file's content below the folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_catalog_is_only_overwritten_if_asked_and_other_files_stay(tmp_path):
    one, two = document(feature("a")), document(feature("b"))
    authoring.write_catalog(tmp_path / "c", one, vectors_of(one))
    (tmp_path / "c" / "cards").mkdir()
    (tmp_path / "c" / "cards" / "a.md").write_text("a card")
    with pytest.raises(CatalogError, match="exists already"):
        authoring.write_catalog(tmp_path / "c", two, vectors_of(two))
    assert store.load(tmp_path / "c").document == one
    authoring.write_catalog(tmp_path / "c", two, vectors_of(two), overwrite=True)
    assert store.load(tmp_path / "c").document == two
    assert (tmp_path / "c" / "cards" / "a.md").read_text() == "a card"


def test_if_the_second_file_cannot_be_moved_the_first_is_put_back(tmp_path, monkeypatch):
    one, two = document(feature("a")), document(feature("b"))
    authoring.write_catalog(tmp_path / "c", one, vectors_of(one))
    before, replace = snapshot(tmp_path), os.replace

    def full(source, target):
        if str(source).endswith("catalog/catalog.yaml"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CatalogError, match="No space left"):
        authoring.write_catalog(tmp_path / "c", two, vectors_of(two), overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    doc = document(feature("a"))
    with pytest.raises(CatalogError, match=r"file/c"):
        authoring.write_catalog(tmp_path / "file" / "c", doc, vectors_of(doc))
    with pytest.raises(CatalogError, match="not a folder"):
        authoring.write_catalog(tmp_path / "file", doc, vectors_of(doc), overwrite=True)


LLAMA = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight",
         "self_attn.k_proj.weight", "mlp.up_proj.weight")  # fmt: skip
GPT2 = ("ln_1.bias", "ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_attn.bias")


def tensors_of(prefix, names, final, layers=3):
    rng = np.random.default_rng(0)

    def draw(name):
        matrix = "proj.weight" in name or "c_attn.weight" in name
        return rng.normal(size=(D, D) if matrix else D).astype(np.float32)

    made = {f"{prefix}.{i}.{name}": draw(name) for i in range(layers) for name in names}
    return made | {final: draw(final)}


def write_model(folder, tensors, config, shards=1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    files = [f"model-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


TEXT = {"hidden_size": D, "num_hidden_layers": 3, "vocab_size": 16}
VISION = {f"model.visual.blocks.{i}.norm1.weight": np.ones(D, np.float32) for i in range(3)}

MODELS = {
    "llama": (
        tensors_of("model.layers", LLAMA, "model.norm.weight"),
        {"architectures": ["LlamaForCausalLM"], **TEXT},
        ["model.norm.weight", "model.layers.0.input_layernorm.weight",
         "model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"],
    ),
    "gpt2": (
        tensors_of("h", GPT2, "ln_f.weight"),
        {"architectures": ["GPT2LMHeadModel"], "n_embd": D, "n_layer": 3, "vocab_size": 16},
        ["ln_f.weight", "h.0.ln_1.weight", "h.2.ln_1.weight", "h.0.attn.c_attn.weight"],
    ),
    "multimodal": (
        tensors_of("model.language_model.layers", LLAMA, "model.language_model.norm.weight")
        | VISION | {"model.language_model.embed_tokens.weight": np.ones((16, D), np.float32)},
        {"architectures": ["SomeForConditionalGeneration"],
         "text_config": {"hidden_size": D, "num_hidden_layers": 3},
         "vision_config": {"hidden_size": 99}},
        ["model.language_model.norm.weight",
         "model.language_model.layers.0.input_layernorm.weight",
         "model.language_model.layers.2.input_layernorm.weight",
         "model.language_model.layers.0.self_attn.k_proj.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_models_fingerprint_names_tensors_at_both_ends_and_its_tokenizer(tmp_path, model, shards):
    tensors, config, names = MODELS[model]
    folder = write_model(tmp_path / "m", tensors, config, shards)
    made = authoring.fingerprint_of(folder)
    assert (made.hidden_size, made.num_hidden_layers, made.vocab_size) == (D, 3, 16)
    assert made.architecture == config["architectures"][0]
    assert list(made.weights) == names
    assert made.tokenizer_sha256 is not None
    served = ModelFolder.read(folder).as_served()
    assert not fingerprint.check(made, served).differences


def test_the_norm_before_the_mlp_multiplies_by_its_weight_and_gemmas_by_one_more(tmp_path):
    tensors, config, _ = MODELS["llama"]
    weight = tensors["model.layers.1.post_attention_layernorm.weight"]
    llama = ModelFolder.read(write_model(tmp_path / "llama", tensors, config, shards=3))
    np.testing.assert_array_equal(llama.mlp_norm(1), weight)
    names = (*LLAMA, "pre_feedforward_layernorm.weight")
    tensors = tensors_of("model.layers", names, "model.norm.weight")
    config = {"architectures": ["Gemma2ForCausalLM"], **TEXT}
    gemma = ModelFolder.read(write_model(tmp_path / "gemma", tensors, config))
    weight = tensors["model.layers.1.pre_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(gemma.mlp_norm(1), 1 + weight)
    with pytest.raises(CatalogError, match="layer 3 has no pre_feedforward_layernorm"):
        gemma.mlp_norm(3)
    other = dataclasses.replace(gemma, architecture="Gemma3nForCausalLM")
    with pytest.raises(CatalogError, match="Gemma3nForCausalLM: the norm before its MLP"):
        other.mlp_norm(1)


def test_a_fine_tune_of_the_model_does_not_match_its_fingerprint(tmp_path):
    tensors, config, names = MODELS["llama"]
    made = authoring.fingerprint_of(write_model(tmp_path / "m", tensors, config))
    for i, name in enumerate(names):
        tuned = tensors | {name: tensors[name] * np.float32(1.001)}
        folder = write_model(tmp_path / f"tuned{i}", tuned, config)
        with pytest.raises(ModelMismatchError, match=name):
            fingerprint.check(made, ModelFolder.read(folder).as_served())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": ["A"]}, "hidden_size"),
        ({"architectures": ["A"], **TEXT, "hidden_size": "8"}, "hidden_size"),
        ({"architectures": ["A"], **TEXT, "num_hidden_layers": 5}, "decoder stack is not clear"),
        ({"architectures": ["A"], "hidden_size": D, "num_hidden_layers": 3}, "vocab_size"),
        ([], "not a JSON object"),
    ],
)
def test_a_model_folder_that_is_not_clear_is_refused(tmp_path, config, message):
    folder = write_model(tmp_path / "m", MODELS["llama"][0], config)
    with pytest.raises(CatalogError, match=message):
        authoring.fingerprint_of(folder)


def test_a_model_folder_without_its_weights_is_refused(tmp_path):
    folder = write_model(tmp_path / "m", *MODELS["llama"][:2], shards=2)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CatalogError, match=r"model-1\.safetensors: No such file"):
        authoring.fingerprint_of(folder)
    (folder / "model-0.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CatalogError, match="no \\*\\.safetensors"):
        authoring.fingerprint_of(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_makes_no_sense_or_leads_out_is_refused(tmp_path, index):
    folder = write_model(tmp_path / "m", *MODELS["llama"][:2])
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CatalogError, match=r"index\.json"):
        authoring.fingerprint_of(folder)


def test_catalogs_of_one_model_merge_and_others_do_not(tmp_path):
    one = document(feature("a"), version="2")
    two = document(feature("b"), description="second")
    catalogs = [
        authoring.write_catalog(tmp_path / n, d, vectors_of(d)) for n, d in (("1", one), ("2", two))
    ]
    doc, encoders = authoring.merge(*catalogs, name="both")
    assert [f.name for f in doc.features] == ["a", "b"]
    assert (doc.name, doc.description, dict(encoders)) == ("both", "second", {})
    with pytest.raises(CatalogError, match="features: 'a' is in both"):
        authoring.merge(catalogs[0], catalogs[0], name="twice")
    other = msgspec.structs.replace(two, model=msgspec.structs.replace(MODEL, vocab_size=17))
    third = authoring.write_catalog(tmp_path / "3", other, vectors_of(other))
    with pytest.raises(CatalogError, match="different models"):
        authoring.merge(catalogs[0], third, name="both")


def test_yaml_is_plain_data():
    assert yaml.safe_load(authoring.to_yaml(everything()))["signals"][0]["calibration"]["map"] == {
        "method": "isotonic", "z": [-1.0, 2.5], "p": [0.0, 1.0],
    }  # fmt: skip
