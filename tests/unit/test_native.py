"""The library that a CPU's sites call: as the equation says at any size, and built once."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from steerscope import config
from steerscope.engine import native, ops, reference
from steerscope.engine.reference import Encoder, Rows
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.steering.interventions import parse_spec

CPU = torch.device("cpu")
INF = float("inf")


class Site:
    """One site, straight on the library: N rows of the tape, the step from ``first_row`` on."""

    def __init__(self, width, num_features, first_row=0, num_rows=70, seed=0):
        rng = np.random.default_rng(seed)
        self.library = native.library()
        assert self.library is not None
        self.W_enc_DF = rng.normal(size=(width, num_features)).astype(np.float32)
        self.b_enc_F = rng.normal(size=num_features).astype(np.float32)
        self.threshold_F = rng.choice([-INF, 0.0, 2.0], num_features).astype(np.float32)
        self.acts_NF = np.full((num_rows, num_features), 7.0, np.float32)
        self.deltas_NF, self.doses_N = np.zeros_like(self.acts_NF), np.zeros(num_rows, np.float32)
        self.W_dec_FD = rng.normal(size=(num_features, width)).astype(np.float32)
        self.mine_F = rng.random(num_features) < 0.7
        self.parameters_SPF = np.zeros((3, 7, num_features), np.float32)
        self.edited_SF = np.zeros((3, num_features), np.int64)
        self.num_edited_S = np.zeros(3, np.int64)
        self.gate_SF = rng.integers(0, num_features, (3, num_features))
        self.max_dose_S = np.array([INF, INF, 0.05], np.float32)
        for row, p in enumerate(self.parameters_SPF):
            p[:] = np.array([1, 0, -INF, INF, -INF, -INF, INF], np.float32)[:, None]
            edited = rng.choice(num_features, min(3, num_features), replace=False) if row else []
            self.edited_SF[row, : len(edited)], self.num_edited_S[row] = edited, len(edited)
            for f in edited:
                p[:, f] = [rng.normal(), rng.normal(), -1.0, 9.0, 0.0, -3.0, 3.0]
        self.rows_T, self.steered_E = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.step = native.Step(first_row, 0, 0, 0)
        self.first_row = first_row
        arrays = {
            "panels": self.library.panels(self.W_enc_DF),
            "b_enc_F": self.library.panels(self.b_enc_F[None]),
            "threshold_F": self.library.panels(self.threshold_F[None]),
            "acts_NF": self.acts_NF,
            "deltas_NF": self.deltas_NF,
            "doses_N": self.doses_N,
            "probe_D": np.zeros(width, np.float32),
            "edited_SF": self.edited_SF,
            "num_edited_S": self.num_edited_S,
            "gate_index_SF": self.gate_SF,
            "parameters_SPF": self.parameters_SPF,
            "max_dose_S": self.max_dose_S,
        }
        self.native = native.Site.made(
            arrays,
            width=width,
            num_features=num_features,
            is_probed=False,
            step=native.ctypes.pointer(self.step),
            here=native.decoder(self.W_dec_FD, self.mine_F),
        )
        self.library.register("native-test", self.native)

    def steer(self, rows_T):
        self.rows_T = np.array(rows_T, np.int64)
        self.steered_E = np.flatnonzero(self.rows_T)
        self.step.num_steered = len(self.steered_E)
        self.step.rows_T, self.step.steered_E = (
            each.ctypes.data for each in (self.rows_T, self.steered_E)
        )

    def run(self, hidden_TD, residual_TD):
        ops.NATIVE.tap(hidden_TD, residual_TD, "native-test")
        at = slice(self.first_row, self.first_row + len(hidden_TD))
        return self.acts_NF[at], self.deltas_NF[at], self.doses_N[at]

    def expected(self, hidden_TD, residual_TD):
        """By the reference: activations, changes, doses and the stream after it."""
        x_TD = hidden_TD.float() + (0 if residual_TD is None else residual_TD.float())
        tensors = map(torch.from_numpy, (self.W_enc_DF, self.b_enc_F, self.threshold_F))
        acts_TF = reference.encode(x_TD, Encoder(*tensors))
        rows_T = torch.from_numpy(self.rows_T)
        columns = torch.from_numpy(self.parameters_SPF).unbind(1)
        *ours, gate_above, gate_below = columns
        gate, cap = torch.from_numpy(self.gate_SF), torch.from_numpy(self.max_dose_S)[:, None]
        rows = Rows(*ours, gate, gate_above, gate_below, cap).at(rows_T)
        delta_TF = reference.edit(acts_TF, rows)
        mine_F = torch.from_numpy(self.mine_F)
        W_dec_FD = torch.from_numpy(self.W_dec_FD) * mine_F[:, None]
        written = reference.decode(delta_TF, W_dec_FD, x_TD, rows.max_dose)
        cut_TF = torch.where(mine_F, delta_TF * written.share_T1, delta_TF)
        hidden_TD = (hidden_TD.float() + written.delta_TD).to(hidden_TD.dtype)
        return acts_TF, cut_TF, written.dose_T, hidden_TD


def stream(num_tokens, width, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, width, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 7, 64, 65])
@pytest.mark.parametrize("num_features", [1, 16, 31, 33, 70])
def test_any_number_of_tokens_and_features_is_read(num_tokens, num_features):
    site = Site(width=45, num_features=num_features)
    hidden_TD, residual_TD = stream(num_tokens, 45)
    before = hidden_TD.clone()
    acts, _, _ = site.run(hidden_TD, residual_TD)
    site.rows_T = np.zeros(num_tokens, np.int64)
    expected = site.expected(before, residual_TD)[0].numpy()
    np.testing.assert_allclose(acts, expected, rtol=1e-4, atol=1e-4)
    assert (site.acts_NF[num_tokens:] == 7.0).all()  # nothing beyond the step
    assert torch.equal(hidden_TD, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [None, torch.float32, "same"])
def test_edits_are_the_equation_in_every_dtype(dtype, residual):
    site = Site(width=96, num_features=40, first_row=20)
    hidden_TD, residual_TD = stream(30, 96, dtype)
    if residual is None:
        residual_TD = None
    elif residual != "same":
        residual_TD = residual_TD.to(residual)
    site.steer(np.arange(30) % 3)
    before = hidden_TD.clone()
    acts, deltas, doses = site.run(hidden_TD, residual_TD)
    wanted = site.expected(before, residual_TD)
    steered, unsteered = site.steered_E, np.flatnonzero(site.rows_T == 0)
    np.testing.assert_allclose(acts, wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(deltas[steered], wanted[1][steered], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(doses[steered], wanted[2][steered], rtol=1e-3, atol=1e-5)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(hidden_TD, wanted[3], rtol=tolerance, atol=tolerance)
    assert torch.equal(hidden_TD[unsteered], before[unsteered])
    assert not torch.equal(hidden_TD[steered], before[steered])
    assert 0.0 < doses[steered][site.rows_T[steered] == 2].max() <= 0.05 * 1.001
    assert (site.acts_NF[:20] == 7.0).all()  # what waits on the tape


def test_rows_that_lie_apart_are_read_where_they_are():
    site = Site(width=32, num_features=16)
    wide_TD = stream(9, 64)[0]
    part_TD = wide_TD[:, 16:48]
    acts, _, _ = site.run(part_TD, None)
    copy = acts.copy()
    assert np.array_equal(site.run(part_TD.contiguous(), None)[0], copy)
    with pytest.raises(RuntimeError, match="not contiguous"):
        site.run(stream(32, 9)[0].T, None)


def test_tokens_have_the_same_bits_in_any_company():
    site = Site(width=64, num_features=50)
    hidden_TD, residual_TD = stream(64, 64)
    together = site.run(hidden_TD, residual_TD)[0].copy()
    for t in range(64):
        alone, _, _ = site.run(hidden_TD[t : t + 1], residual_TD[t : t + 1])
        assert np.array_equal(alone[0], together[t])


def test_a_stream_that_is_not_a_number_stays_what_it_is():
    site = Site(width=32, num_features=20)
    hidden_TD, residual_TD = stream(3, 32)
    hidden_TD[1, 5] = float("nan")
    acts, _, _ = site.run(hidden_TD, residual_TD)
    assert np.isnan(acts[1]).all()
    assert np.isfinite(acts[[0, 2]]).all()


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (torch.zeros(2, 32, dtype=torch.float64), "neither float32, bfloat16 nor float16"),
        (torch.zeros(2, 33), "not the model's width"),
    ],
)
def test_what_it_cannot_read_is_refused(hidden, says):
    Site(width=32, num_features=4)
    with pytest.raises(RuntimeError, match=says):
        ops.NATIVE.tap(hidden, None, "native-test")


def test_a_site_that_nobody_made_is_refused():
    with pytest.raises(RuntimeError, match="no such site"):
        ops.NATIVE.tap(torch.zeros(2, 32), None, "nobody's")


def test_without_a_compiler_sites_take_the_path_of_the_reference(tiny_world, monkeypatch, caplog):
    from steerscope.catalog import store

    native.start.cache_clear()
    monkeypatch.setattr(config, "compiler", lambda: None)
    catalog = store.load(tiny_world.catalog)
    try:
        with caplog.at_level(logging.WARNING):
            step = StepRows(8, CPU)
        tap = SiteTap(catalog, next(iter(catalog.sites)), step, 4, CPU)
        assert ops.register("uncompiled", tap) is ops.PYTHON
        assert "no C++ compiler" in caplog.text
        edits = '{"interventions": [{"feature": "direction_1", "add": 2.0}]}'
        tap.write_row(1, list(parse_spec(edits).interventions))
        step.stage(np.array([0, 1], np.int64))
        hidden_TD = stream(2, 128)[0]
        before = hidden_TD.clone()
        ops.PYTHON.tap(hidden_TD, None, "uncompiled")
        W_dec_D = torch.from_numpy(catalog.vectors["direction_1"].W_dec)
        torch.testing.assert_close(hidden_TD[1], before[1] + 2.0 * W_dec_D)
        assert torch.equal(hidden_TD[0], before[0])
    finally:
        native.start.cache_clear()


def test_a_compiler_that_fails_is_told_with_what_it_said(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(config, "compiler", lambda: str(broken))
    monkeypatch.setattr(config, "cache_folder", lambda: tmp_path / "cache")
    assert native._load() is None
    assert "no such header" in caplog.text
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_processes_that_start_together_build_it_once(tmp_path):
    """A compiler that notes its calls; three processes want the library at once."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "c++"
    real = config.compiler()
    compiler.write_text(f'#!/bin/sh\necho x >> {calls}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    code = "from steerscope.engine import native, ops; assert native.library() is not None"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert calls.read_text().count("x") == 1
    (folder,) = (path for path in tmp_path.iterdir() if path.name == "steerscope")
    assert folder.stat().st_mode & 0o077 == 0
