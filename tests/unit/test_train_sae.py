"""Training a small dictionary, judging it, and keeping it as SAELens does.

Shapes: N tokens, D width, K latents, P planted features.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from steerscope.catalog.formats import open_source
from steerscope.catalog.model import FeatureKind, Site
from steerscope.cli.main import main
from steerscope.engine import reference
from steerscope.errors import CatalogError, LabError
from steerscope.lab.dictionaries import (
    Dictionary,
    DictionarySettings,
    load,
    measure,
    save_saelens,
    train,
)
from steerscope.lab.train_sae import train_on
from torch import Tensor

WIDTH, NUM_PLANTED, NUM_TOKENS = 32, 40, 20_000
SETTINGS = DictionarySettings(d_sae=48, k=3, num_steps=600)
QUICK = DictionarySettings(d_sae=48, k=3, num_steps=30)


@pytest.fixture(scope="module")
def planted_PD() -> Tensor:
    drawn = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(NUM_PLANTED, WIDTH, generator=drawn), dim=1)


@pytest.fixture(scope="module")
def streams_ND(planted_PD: Tensor) -> Tensor:
    """Three planted features a token, an offset and a little noise, at the scale of a model."""
    drawn = torch.Generator().manual_seed(6)
    chosen_NP = torch.rand(NUM_TOKENS, NUM_PLANTED, generator=drawn).argsort(1) < 3
    sizes_NP = 1 + torch.rand(NUM_TOKENS, NUM_PLANTED, generator=drawn)
    noise_ND = 0.02 * torch.randn(NUM_TOKENS, WIDTH, generator=drawn)
    offset_D = torch.randn(WIDTH, generator=drawn)
    return 7 * ((chosen_NP * sizes_NP) @ planted_PD + offset_D + noise_ND)


@pytest.fixture(scope="module")
def trained(streams_ND: Tensor) -> Dictionary:
    return train(streams_ND, SETTINGS)


@pytest.fixture(scope="module")
def quick(streams_ND: Tensor) -> Dictionary:
    return train(streams_ND, QUICK)


def test_planted_sparse_features_are_recovered(
    trained: Dictionary, planted_PD: Tensor, streams_ND: Tensor
) -> None:
    found_P = (planted_PD @ trained.W_dec_KD.T).max(dim=1).values
    assert (found_P > 0.95).float().mean() >= 0.9
    quality = measure(trained, streams_ND)
    assert quality.unexplained < 0.05
    assert quality.l0 == pytest.approx(3, abs=0.5)


def test_the_same_call_gives_the_same_dictionary_bit_for_bit(
    quick: Dictionary, streams_ND: Tensor
) -> None:
    again = train(streams_ND, QUICK)
    for ours, theirs in zip(quick, again, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    other = train(streams_ND, DictionarySettings(d_sae=48, k=3, num_steps=30, seed=1))
    assert not torch.equal(other.W_dec_KD, quick.W_dec_KD)


def test_quality_is_what_can_be_counted_by_hand() -> None:
    eye = torch.eye(2)
    wide = torch.cat([eye, eye[:, :1]], dim=1)
    silent = torch.tensor([0.0, 0.0, -9.0])
    dictionary = Dictionary(wide, silent, torch.cat([eye, eye[:1]]), torch.zeros(2), 0.5, 0.0)
    quality = measure(dictionary, torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.25], [0.0, 0.0]]))
    assert quality.l0 == 3 / 4
    assert quality.num_dead == 1
    assert quality.num_tokens == 4
    assert quality.unexplained == pytest.approx(0.25**2 / (2.75 + 6.421875))


def test_measuring_in_blocks_changes_nothing(
    quick: Dictionary, streams_ND: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(quick, streams_ND)
    monkeypatch.setattr("steerscope.lab.dictionaries.MAX_BLOCK_ELEMENTS", 48 * 999)
    blocks = measure(quick, streams_ND)
    assert (blocks.l0, blocks.num_dead) == (whole.l0, whole.num_dead)
    assert blocks.unexplained == pytest.approx(whole.unexplained, rel=1e-5)


def test_quality_is_measured_on_tokens_that_were_not_trained_on(streams_ND: Tensor) -> None:
    spoiled_ND = streams_ND.clone()
    spoiled_ND[-NUM_TOKENS // 10 :] = torch.randn(NUM_TOKENS // 10, WIDTH)
    honest, fooled = (train_on(x_ND.numpy(), QUICK) for x_ND in (streams_ND, spoiled_ND))
    assert torch.equal(honest.dictionary.W_enc_DK, fooled.dictionary.W_enc_DK)
    assert honest.quality.num_tokens == NUM_TOKENS // 10
    assert fooled.quality.unexplained > 2 * honest.quality.unexplained


def test_a_folder_gives_back_the_same_activations(
    trained: Dictionary, streams_ND: Tensor, tmp_path: Path
) -> None:
    save_saelens(trained, tmp_path / "sae", Site.RESID_POST, 3, "tiny")
    loaded = load(tmp_path / "sae")
    # as it lies in the file, for a product of the transposed one rounds in another order
    stored = trained._replace(W_enc_DK=trained.W_enc_DK.contiguous())
    assert torch.equal(loaded.acts(streams_ND), stored.acts(streams_ND))
    assert loaded.unexplained == trained.unexplained


@pytest.mark.parametrize("site", Site)
def test_a_folder_is_imported_as_any_of_saelens_is(
    site: Site, quick: Dictionary, streams_ND: Tensor, tmp_path: Path
) -> None:
    save_saelens(quick, tmp_path / "sae", site, 3, "tiny", QUICK, measure(quick, streams_ND))
    with open_source("saelens", tmp_path / "sae") as source:
        assert (source.kind, source.site, source.layer) == (FeatureKind.SAE_LATENT, site, 3)
        columns = source.columns([4, 40])
    assert columns.threshold is not None
    W_enc_DF = torch.from_numpy(columns.W_enc).T
    encoder = reference.Encoder(W_enc_DF, *map(torch.from_numpy, columns[1:3]))
    few_ND = streams_ND[:200]  # so few that none is within rounding of the threshold
    wanted_NF = quick.acts(few_ND)[:, [4, 40]]
    assert (wanted_NF > 0).any(0).all()
    torch.testing.assert_close(
        reference.encode(few_ND, encoder), wanted_NF, rtol=0, atol=1e-5 * float(few_ND.std())
    )
    np.testing.assert_array_equal(columns.W_dec, quick.W_dec_KD[[4, 40]].numpy())


def test_settings_and_quality_are_told_in_the_folder(
    quick: Dictionary, streams_ND: Tensor, tmp_path: Path
) -> None:
    quality = measure(quick, streams_ND)
    save_saelens(quick, tmp_path / "sae", Site.RESID_POST, 3, "tiny", QUICK, quality)
    told = json.loads((tmp_path / "sae/cfg.json").read_bytes())["metadata"]["steerscope"]
    assert told["quality"]["unexplained"] == quality.unexplained
    assert told["quality"]["l0"] == quality.l0
    assert told["quality"]["num_dead"] == quality.num_dead
    assert told["settings"]["k"] == 3


@pytest.mark.parametrize(
    ("streams", "settings", "reason"),
    [
        (torch.full((500, 4), torch.nan), DictionarySettings(8, 2), "NaN"),
        (torch.zeros(500), DictionarySettings(8, 2), r"not float32 \[N, D\]"),
        (torch.zeros(500, 4, dtype=torch.float64), DictionarySettings(8, 2), "not float32"),
        (torch.ones(500, 4), DictionarySettings(8, 2), "all streams are the same"),
        (torch.rand(500, 4), DictionarySettings(8, 9), "k is 9, expected 1 to d_sae"),
        (torch.rand(500, 4), DictionarySettings(8, 0), "k is 0"),
        (torch.rand(500, 4), DictionarySettings(8, 2, num_steps=0), "num_steps"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    streams: Tensor, settings: DictionarySettings, reason: str
) -> None:
    with pytest.raises(LabError, match=reason):
        train(streams, settings)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(LabError, match="100 tokens for 48 latents"):
        train_on(np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32), SETTINGS)


def test_measuring_on_one_token_is_refused(quick: Dictionary, streams_ND: Tensor) -> None:
    with pytest.raises(LabError, match="all the same"):
        measure(quick, streams_ND[:1])


def test_what_is_there_is_not_overwritten(quick: Dictionary, tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    with pytest.raises(LabError, match="exists already"):
        save_saelens(quick, tmp_path / "sae", Site.RESID_POST, 3, "tiny")
    assert list(tmp_path.rglob("*")) == [tmp_path / "sae"]


@pytest.mark.parametrize(
    ("site", "out", "reason"),
    [("resid_post.3", ".", "exists already"), ("resid_post", "new", "'resid_post' is not a site")],
)
def test_the_command_refuses_what_it_can_before_it_starts_vllm(
    site: str, out: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cases", str(tmp_path / "cases.jsonl"), "--out", str(tmp_path / out)]
    assert main(["lab", "train-sae", str(tmp_path), "--site", site, *where]) == 2
    assert reason in capsys.readouterr().err


def test_a_dictionary_with_nan_is_not_written(quick: Dictionary, tmp_path: Path) -> None:
    broken = quick._replace(b_dec_D=torch.full((WIDTH,), torch.nan))
    with pytest.raises(LabError, match="nothing was written"):
        save_saelens(broken, tmp_path / "sae", Site.RESID_POST, 3, "tiny")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def kept(quick: Dictionary, tmp_path: Path) -> Path:
    save_saelens(quick, tmp_path / "sae", Site.RESID_POST, 3, "tiny")
    return tmp_path / "sae"


def _rewrite(folder: Path, name: str, value: Tensor) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, name: value}, folder / "sae_weights.safetensors")


def test_a_truncated_folder_is_refused(kept: Path) -> None:
    weights = kept / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CatalogError, match="truncated"):
        load(kept)


def test_an_unknown_key_in_the_config_is_refused(kept: Path) -> None:
    config = json.loads((kept / "cfg.json").read_bytes())
    (kept / "cfg.json").write_text(json.dumps({**config, "surprise": 1}))
    with pytest.raises(LabError, match="surprise"):
        load(kept)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("b_enc", torch.zeros(47), r"'b_enc' is \[47\], expected \[48\]"),
        ("b_enc", torch.full((48,), torch.inf), "NaN or infinite"),
        ("threshold", torch.arange(48.0), "thresholds differ"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    name: str, value: Tensor, reason: str, kept: Path
) -> None:
    _rewrite(kept, name, value)
    with pytest.raises(LabError, match=reason):
        load(kept)
