"""A tap's Triton kernels against the reference, and what they leave alone.

The cases run under Triton's interpreter, which must be chosen before Triton is imported: so in one
process of their own, this file as a script, which tells for each case nothing or what went wrong.
Where there is a GPU they run on it as well. Each stage is compared given what the kernels made of
the one before, for an activation at its threshold may fall to either side.

T tokens, D width, F features, S rows.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from steerscope.catalog import store
from steerscope.engine import kernels, reference
from steerscope.engine.reference import Encoder, Rows
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.steering.interventions import parse_spec

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNTOUCHED = float("nan")
"""What lies beyond the buffers' first T tokens and beside the columns in use: it shows if read."""
NUM_ROWS = 5
NO_TRITON = "Triton is not installed: vLLM brings it on x86-64 Linux only"
CPU_DRIVER = Path(__file__).parents[1] / "triton_cpu"

CASES: dict[str, Callable[[str], None]] = {}


def case(function: Callable[[str], None]) -> Callable[[str], None]:
    """Run on the device that the argument names."""
    CASES[function.__name__] = function
    return function


def run_apart(what: str, environment: dict[str, str]) -> dict[str, Any]:
    """This file as a script."""
    ran = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in each case, under the interpreter."""
    if kernels.triton is None:
        pytest.skip(NO_TRITON)
    return run_apart("interpret", {"TRITON_INTERPRET": "1"})


class Site:
    """Random weights, rows and T tokens; buffers longer and wider than what is used of them."""

    def __init__(
        self, T, D, F, dtype=torch.float32, device="cpu", *, seed=0, steered=0.3, residual=True
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.T, self.D, self.F, self.device = T, D, F, device
        self.hidden_TD = self.part(2 * self.normal(T, D), dtype)
        self.residual_TD = self.part(self.normal(T, D), dtype) if residual else None
        thresholds_F = self.normal(F).abs() * 0.3
        thresholds_F[::3] = -INF  # identity
        self.encoder = Encoder(
            self.part(self.normal(D, F) / D**0.5), self.on(self.normal(F)), self.on(thresholds_F)
        )
        self.rows = self.random_rows(F)
        rows_T = torch.randint(1, NUM_ROWS, (T,), generator=self.random)
        is_steered_T = torch.rand(T, generator=self.random) < steered
        is_steered_T[:1] |= steered > 0
        self.rows_T = self.on(torch.cat([rows_T * is_steered_T, torch.full((3,), NUM_ROWS - 1)]))
        self.mine_F = self.on(torch.rand(F, generator=self.random) < 0.7)
        W_dec_FD = self.normal(F, D) / D**0.5
        self.W_dec_FD = self.part(W_dec_FD * self.mine_F.cpu().unsqueeze(1))
        self.acts_TF, self.deltas_TF = (self.buffer(T + 3, F) for _ in range(2))
        self.doses_T = self.buffer(T + 3, 1)[:, 0].contiguous()
        self.scratch = self.on(torch.full(kernels.scratch_shape(T, D, F), torch.nan))
        self.probe_D = self.buffer(D + 3, 1)[:, 0].contiguous()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def on(self, values):
        return values.to(self.device)

    def buffer(self, height, width, dtype=torch.float32):
        """The columns in use of a wider matrix."""
        whole = torch.full((height, width + 2), UNTOUCHED, dtype=dtype, device=self.device)
        return whole[:, :width]

    def part(self, values, dtype=torch.float32):
        """As columns of a wider matrix."""
        return self.buffer(*values.shape, dtype).copy_(values)

    def random_rows(self, F):
        """Each third of the features, or so: unedited, clipped, and edited behind gates."""
        shape = (NUM_ROWS, F)
        kind = torch.randint(0, 3, shape, generator=self.random)
        is_edited, is_gated = kind > 0, (kind == 2)

        def where(mask, values, neutral):
            table = torch.where(mask, values, neutral)
            table[0] = neutral
            return self.part(table)

        lo = self.normal(*shape)
        other = torch.randint(0, F, shape, generator=self.random)
        gate_index = torch.where(is_gated, other, torch.arange(F))
        gate_index[0] = torch.arange(F)
        max_dose_S1 = torch.tensor([INF, INF, 0.5, 0.05, 0.0]).unsqueeze(1)
        return Rows(
            scale=where(is_edited, self.normal(*shape), 1.0),
            add=where(is_edited, self.normal(*shape), 0.0),
            lo=where(is_edited, lo, -INF),
            hi=where(is_edited, lo + self.normal(*shape).abs(), INF),
            self_above=where(is_gated, self.normal(*shape) * 0.5, -INF),
            gate_index=self.on(gate_index),
            gate_above=where(is_gated, self.normal(*shape) - 1.0, -INF),
            gate_below=where(is_gated, self.normal(*shape) + 1.0, INF),
            max_dose=self.on(max_dose_S1),
        )

    def encode_and_edit(self):
        kernels.encode_and_edit(
            self.hidden_TD,
            self.residual_TD,
            self.encoder,
            self.rows,
            self.rows_T,
            self.acts_TF,
            self.deltas_TF,
            self.doses_T,
            self.scratch,
            self.probe_D,
        )

    def land(self, hidden_TD=None, residual_TD=None, W_dec_FD=None, mine_F=None):
        kernels.land(
            self.hidden_TD if hidden_TD is None else hidden_TD,
            self.residual_TD if hidden_TD is None else residual_TD,
            self.W_dec_FD if W_dec_FD is None else W_dec_FD,
            self.mine_F if mine_F is None else mine_F,
            self.rows.max_dose,
            self.rows_T,
            self.deltas_TF,
            self.doses_T,
        )

    def run(self):
        self.encode_and_edit()
        self.land()
        return self

    @property
    def x_TD(self):
        x_TD = self.hidden_TD.float()
        return x_TD if self.residual_TD is None else x_TD + self.residual_TD.float()

    @property
    def is_steered_T(self):
        return self.rows_T[: self.T] != 0


def bits(tensor):
    """Equal only where -0.0 and every NaN are."""
    size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(size)


def is_untouched(tensor):
    return bool(tensor.isnan().all())


def check_encode(site):
    x_TD = site.x_TD
    pre_TF = x_TD.double() @ site.encoder.W_enc_DF.double() + site.encoder.b_enc_F.double()
    acts_TF = site.acts_TF[: site.T]
    is_close_TF = (acts_TF - reference.encode(x_TD, site.encoder)).abs() <= 2e-5
    is_at_threshold_TF = (pre_TF - site.encoder.threshold_F).abs() <= 2e-5
    assert (is_close_TF | is_at_threshold_TF).all()
    assert torch.equal(bits(site.probe_D[: site.D]), bits(x_TD[0]))


def check_edit(site):
    rows_TF = site.rows.at(site.rows_T[: site.T])
    expected_TF = reference.edit(site.acts_TF[: site.T], rows_TF)
    deltas_TF = site.deltas_TF[: site.T]
    assert torch.equal(deltas_TF[site.is_steered_T], expected_TF[site.is_steered_T])
    assert not bits(deltas_TF[~site.is_steered_T]).any()
    assert not bits(site.doses_T[: site.T]).any()


def check_land(site, hidden_TD, residual_TD, before, W_dec_FD, mine_F):
    """``before``: hidden, changes and doses as they were."""
    was_TD, deltas_TF, doses_T = before
    y_TD = was_TD.float() if residual_TD is None else was_TD.float() + residual_TD.float()
    max_dose_T1 = site.rows.max_dose[site.rows_T[: site.T]]
    written = reference.decode(deltas_TF, W_dec_FD, y_TD, max_dose_T1)
    steered = site.is_steered_T
    dtype = hidden_TD.dtype
    expected_TD = (was_TD.float() + written.delta_TD).to(dtype)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(hidden_TD[steered], expected_TD[steered], rtol=eps, atol=1e-5)
    assert torch.equal(bits(hidden_TD[~steered]), bits(was_TD[~steered]))
    expected_TF = torch.where(mine_F, deltas_TF * written.share_T1, deltas_TF)
    torch.testing.assert_close(
        site.deltas_TF[: site.T][steered], expected_TF[steered], rtol=1e-5, atol=1e-6
    )
    expected_T = torch.maximum(doses_T, written.dose_T)
    torch.testing.assert_close(
        site.doses_T[: site.T][steered], expected_T[steered], rtol=1e-5, atol=1e-7
    )


def check(site):
    """Both kernels against the reference, and the rest of every buffer untouched."""
    site.encode_and_edit()
    check_encode(site)
    check_edit(site)
    before = [t[: site.T].clone() for t in (site.hidden_TD, site.deltas_TF, site.doses_T)]
    site.land()
    check_land(site, site.hidden_TD, site.residual_TD, before, site.W_dec_FD, site.mine_F)
    for buffer in (site.acts_TF, site.deltas_TF, site.doses_T):
        assert is_untouched(buffer[site.T :])
    assert is_untouched(site.probe_D[site.D :])
    for matrix in (site.hidden_TD, site.acts_TF, site.deltas_TF):
        whole = torch.as_strided(matrix, (len(matrix), matrix.shape[1] + 2), matrix.stride())
        assert is_untouched(whole[:, matrix.shape[1] :])


@case
def every_shape_and_dtype_equals_the_reference(device):
    widths = itertools.cycle((40, 128, 896))
    dtypes = itertools.cycle(DTYPES)
    for seed, (T, F) in enumerate(itertools.product((1, 3, 17, 64, 130), (1, 7, 64, 200))):
        # The interpreter takes a millisecond for each edited feature of each steered token.
        steered = 1.0 if T * F < 200 else min(800 / (T * F), 0.5)
        check(Site(T, next(widths), F, next(dtypes), device, seed=seed, steered=steered))


@case
def every_dtype_equals_the_reference_where_the_product_is_split(device):
    for dtype in DTYPES:
        site = Site(5, 896, 70, dtype, device, steered=0.6)
        assert kernels.cut(site.T, site.D, site.F).splits > 1
        check(site)


@case
def a_stream_without_a_residual_is_read_as_it_is(device):
    check(Site(6, 40, 9, torch.bfloat16, device, steered=0.5, residual=False))


@case
def the_last_parts_of_a_split_width_may_be_short_or_empty(device):
    for D in (300, 700, 1100):
        check(Site(2, D, 5, torch.float32, device, steered=1.0))


@case
def a_step_cut_up_otherwise_gives_nearly_the_same(device):
    site = Site(17, 896, 64, device=device).run()
    whole = Site(17, 896, 64, device=device)
    depth, kernels.MIN_DEPTH = kernels.MIN_DEPTH, 10**6
    try:
        assert kernels.cut(17, 896, 64).splits == 1
        whole.run()
    finally:
        kernels.MIN_DEPTH = depth
    assert kernels.cut(17, 896, 64).splits > 1
    torch.testing.assert_close(site.acts_TF[:17], whole.acts_TF[:17], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(site.hidden_TD, whole.hidden_TD, rtol=1e-4, atol=1e-4)


@case
def the_same_step_gives_the_same_bits(device):
    first, second = (Site(17, 896, 64, torch.bfloat16, device).run() for _ in range(2))
    for name in ("hidden_TD", "acts_TF", "deltas_TF", "doses_T"):
        assert torch.equal(bits(getattr(first, name)), bits(getattr(second, name)))


@case
def an_unsteered_step_changes_nothing_in_the_stream(device):
    site = Site(20, 128, 7, torch.bfloat16, device, steered=0.0)
    was_TD = site.hidden_TD.clone()
    check(site)
    assert torch.equal(bits(site.hidden_TD), bits(was_TD))


@case
def an_unsteered_token_keeps_every_bit_whatever_it_holds(device):
    for dtype in DTYPES:
        site = Site(20, 128, 7, dtype, device, steered=0.5)
        odd = [1, 4, 5, 9]
        site.rows_T[odd] = 0
        site.hidden_TD[1] = -0.0
        site.hidden_TD[4] = INF
        site.hidden_TD[5, 3] = torch.nan
        site.hidden_TD[9, 5] = -INF
        was_TD = site.hidden_TD.clone()
        site.run()
        assert torch.equal(bits(site.hidden_TD[odd]), bits(was_TD[odd]))
        assert not bits(site.deltas_TF[odd]).any()


@case
def what_one_token_holds_reaches_no_other(device):
    for row, value in itertools.product((0, 1), (INF, torch.nan)):
        site, other = (Site(6, 260, 20, torch.bfloat16, device, steered=0.5) for _ in range(2))
        for each in (site, other):
            each.rows_T[3] = row
        other.hidden_TD[3, 11:60] = value
        site.run()
        other.run()
        rest = [t for t in range(6) if t != 3]
        for name in ("hidden_TD", "acts_TF", "deltas_TF", "doses_T"):
            assert torch.equal(bits(getattr(site, name)[rest]), bits(getattr(other, name)[rest]))


@case
def what_is_not_a_number_is_read_as_none(device):
    site = Site(4, 128, 9, torch.bfloat16, device)
    site.rows_T[:4] = torch.tensor([0, 1, 0, 1])
    site.hidden_TD[:2, 3] = torch.nan
    site.run()
    assert site.acts_TF[:2].isnan().all()
    assert site.acts_TF[2:4].isfinite().all()


@case
def a_gate_may_look_at_a_feature_of_another_block(device):
    for num_tokens, D in ((2, 40), (2, 260)):
        site = Site(num_tokens, D, 200, device=device, steered=1.0)
        site.rows_T[:num_tokens] = torch.arange(num_tokens) % 3
        for table, neutral in zip(site.rows, (1, 0, -INF, INF, -INF, 0, -INF, INF), strict=False):
            table.fill_(neutral)
        site.rows.gate_index.copy_(torch.arange(200).expand(NUM_ROWS, 200))
        site.rows.add[1:, 3] = 2.0
        site.rows.gate_index[1:, 3] = 130
        site.encoder.threshold_F.fill_(-INF)
        site.encode_and_edit()
        at = float(site.acts_TF[1, 130])
        for above, below, holds in (
            (at - 1, at + 1, True),
            (at, INF, False),
            (-INF, at, False),
            (-INF, INF, True),
        ):
            site.rows.gate_above[1, 3] = above
            site.rows.gate_below[1, 3] = below
            site.encode_and_edit()
            assert float(site.deltas_TF[1, 3]) == pytest.approx(2.0 if holds else 0.0)
            assert site.deltas_TF[1].count_nonzero() == int(holds)
            check_edit(site)


@case
def a_capped_dose_is_what_was_applied(device):
    site = Site(12, 128, 30, device=device, steered=1.0)
    site.rows_T[:12] = 3
    was_TD = site.x_TD.clone()
    site.run()
    dose_T = (site.x_TD - was_TD).norm(dim=1) / was_TD.norm(dim=1)
    torch.testing.assert_close(site.doses_T[:12], dose_T, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(dose_T, torch.full_like(dose_T, 0.05), rtol=1e-3, atol=0.0)
    landed_TD = (site.deltas_TF[:12] * site.mine_F) @ site.W_dec_FD
    torch.testing.assert_close(site.x_TD - was_TD, landed_TD, rtol=1e-3, atol=1e-4)


@case
def a_site_may_write_at_two_places(device):
    site = Site(9, 128, 12, torch.bfloat16, device, steered=0.7)
    there_TD = site.part(site.normal(9, 128), torch.bfloat16)
    theirs_F = ~site.mine_F
    W_dec_FD = site.part(site.normal(12, 128) * theirs_F.cpu().unsqueeze(1))
    site.run()
    before = [t[:9].clone() for t in (there_TD, site.deltas_TF, site.doses_T)]
    site.land(there_TD, None, W_dec_FD, theirs_F)
    check_land(site, there_TD, None, before, W_dec_FD, theirs_F)
    assert torch.equal(site.deltas_TF[:9, site.mine_F], before[1][:, site.mine_F])


@case
def a_step_of_no_tokens_does_nothing(device):
    site = Site(2, 40, 3, device=device)
    site.hidden_TD, site.residual_TD = site.hidden_TD[:0], site.residual_TD[:0]
    site.run()
    assert is_untouched(site.acts_TF)
    assert is_untouched(site.deltas_TF)


@case
def a_tap_of_a_worker_does_with_kernels_what_it_does_in_native_code(device):
    edits = (
        '{"feature": "transcoder_mlp_in_1", "clamp": 9.0}, '
        '{"feature": "direction_mlp_in_1", "add": 7.0}'
    )
    interventions = list(parse_spec(f'{{"interventions": [{edits}]}}').interventions)
    random = torch.Generator().manual_seed(3)
    read_TD, residual_TD, written_TD = (torch.randn(20, 128, generator=random) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        catalog = store.load(oracle.world(Path(folder)).catalog)
        (key,) = (k for k in catalog.sites if str(k) == "mlp_in.1")
        outcomes = []
        for where, is_native in ((torch.device("cpu"), True), (torch.device(device), False)):
            step = StepRows(32, where, is_native)
            tap = SiteTap(catalog, key, step, 4, where)
            tap.write_row(1, interventions, max_dose=0.3)
            here, there = read_TD.clone().to(where), written_TD.clone().to(where)
            for rows in ([0] * 20, [0, 1, 1, 0, 0] * 4):  # the first pass is a neutral one
                step.stage(np.array(rows, np.int64))
                tap(here, residual_TD.to(where))
                tap.write(there, None)
                step.clear()
            made = (here, there, tap.acts_TF[:20], tap.deltas_TF[[1, 2, 6]], tap.doses_T[[1, 2, 6]])
            outcomes.append([each.cpu() for each in made])
        assert tap._kernels is kernels
        assert not tap._cold
    for native, kernel in zip(*outcomes, strict=True):
        torch.testing.assert_close(native, kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_under_the_interpreter(name, interpreted):
    assert not interpreted[name], interpreted[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    CASES[name]("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_follows_the_rows_that_are_staged_later():
    site = Site(8, 896, 64, torch.bfloat16, "cuda", steered=0.0)
    given_TD, rows_T = site.hidden_TD.clone(), site.rows_T.clone()
    site.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        site.run()
    for row in (1, 0, 2):
        site.hidden_TD.copy_(given_TD)
        site.rows_T.copy_(rows_T)
        site.rows_T[3] = row
        graph.replay()
        fresh = Site(8, 896, 64, torch.bfloat16, "cuda", steered=0.0)
        fresh.rows_T[3] = row
        fresh.run()
        assert torch.equal(bits(site.hidden_TD), bits(fresh.hidden_TD))


@pytest.mark.parametrize("D", [1, 40, 128, 896, 4096, 16384])
@pytest.mark.parametrize("F", [1, 7, 64, 200, 1024])
def test_the_scratch_holds_every_step_and_8_mib_at_most(D, F):
    (size,) = kernels.scratch_shape(8192, D, F)
    assert 4 * size <= 8 << 20
    for T in (*range(1, 700), *range(700, 8193, 53)):
        how = kernels.cut(T, D, F)
        assert how.splits * how.depth >= D
        assert how.splits == 1 or how.splits * T * F <= size
        assert how.splits == 1 or how.splits * T * F <= kernels.scratch_shape(T, D, F)[0]


def test_the_named_sizes_meet_every_way_of_cutting():
    for D, F in itertools.product((40, 896, 4096), (1, 64, 1024)):
        named = kernels.sizes(8192, D, F)
        assert max(named) <= 8192
        met = {kernels.cut(T, D, F) for T in named}
        assert {kernels.cut(T, D, F) for T in range(1, 8193)} == met
        assert len(named) == len(met) <= 16


def test_every_launch_compiles_for_a_gpu_and_none_uses_tf32(tmp_path):
    """By Triton's own compiler, which needs no GPU."""
    if kernels.triton is None:
        pytest.skip(NO_TRITON)
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(CPU_DRIVER)}
    built = run_apart("compile", environment)
    assert set(built) == {"_encode", "_edit", "_land"}
    assert "fma.rn.f32" in built["_encode"]
    assert not [each for words in built.values() for each in words if re.search("mma|tf32", each)]


def compile_launches() -> dict[str, list[str]]:
    """The instructions of each kernel, compiled for an H100 as it is launched; nothing runs."""
    from steerscope_triton_cpu.driver import CPUDriver
    from triton import JITFunction
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Absent(CPUDriver):
        def __init__(self) -> None:
            pass

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    instructions: dict[str, set[str]] = {}
    run = JITFunction.run

    def only_compile(kernel, *args, warmup, **options):
        built = run(kernel, *args, warmup=True, **options)
        words = re.findall(r"^\s+(?:@\S+ )?([a-z]\S+)", built.asm["ptx"], re.MULTILINE)
        instructions.setdefault(kernel.__name__, set()).update(words)
        return built

    driver.set_active(Absent())
    JITFunction.run = only_compile
    Site(1, 1, 1, residual=False).run()
    Site(3, 896, 7, torch.bfloat16).run()
    Site(600, 128, 200, torch.float16).run()
    return {name: sorted(words) for name, words in instructions.items()}


def interpret_cases() -> dict[str, str]:
    """What went wrong in each case, under the interpreter."""
    found = {}
    for name, function in CASES.items():
        try:
            function("cpu")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    made = compile_launches() if sys.argv[1] == "compile" else interpret_cases()
    print(json.dumps(made))
