"""The op against the equation: exact where nothing is asked, equal where something is."""

import json

import numpy as np
import oracle
import pytest
import torch
from hf_reference import Reference
from steerscope.catalog import store
from steerscope.engine import ops
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.steering.interventions import parse_spec

SPECS = [
    '{"feature": "latent_1", "clamp": 3.0}',
    '{"feature": "unit_1", "ablate": true}',
    '{"feature": "unit_1", "at_least": 2.0}',
    '{"feature": "direction_1", "at_most": -0.5}',
    '{"feature": "direction_1", "scale": -2.0}',
    '{"feature": "latent_1", "add": 1.0, "only_if_active": true}',
    '{"feature": "unit_1", "clamp": 4.0, "when": {"feature": "probe_1", "above": 0.0}}',
    '{"feature": "unit_1", "clamp": 4.0, "when": {"feature": "probe_1", "below": 0.5}}',
    '{"feature": "latent_1", "clamp": 3.0}, {"feature": "direction_1", "add": 2.0}',
]


class Site:
    def __init__(self, tiny_world, max_num_tokens=32, is_native=True):
        self.catalog = store.load(tiny_world.catalog)
        self.step = StepRows(max_num_tokens, torch.device("cpu"), is_native)
        self.key = next(iter(self.catalog.sites))
        self.tap = SiteTap(self.catalog, self.key, self.step, 4, torch.device("cpu"))
        self.op = ops.register("test", self.tap).tap

    def run(self, hidden, residual, rows):
        self.step.stage(np.array(rows, np.int64))
        edited = hidden.clone()
        self.op(edited, residual, "test")
        return edited


@pytest.fixture
def site(tiny_world):
    return Site(tiny_world)


def stream(num_tokens=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (2 * torch.randn(num_tokens, 128, generator=generator)).to(dtype) for _ in range(2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neutral_row_leaves_every_bit_alone(site, dtype):
    hidden, residual = stream(dtype=dtype)
    hidden[0, 0] = -0.0
    for edited in (
        site.run(hidden, residual, [0] * 6),
        site.run(hidden, None, [0] * 6),
        site.run(hidden, residual, [0, 0, 0, 0, 0, 1])[:5],
    ):
        expected = hidden[: len(edited)]
        assert torch.equal(edited.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_an_edit_is_the_equation(site, tiny_world, spec):
    hidden, residual = stream()
    interventions = list(parse_spec(f'{{"interventions": [{spec}]}}').interventions)
    site.tap.write_row(1, interventions)
    edited = site.run(hidden, residual, [0, 1, 1, 1, 1, 1])
    plain = Reference(tiny_world.model, tiny_world.catalog)
    for token in range(1, 6):
        x = hidden[token] + residual[token]
        acts = {f.name: plain.activation(f.name, x) for f in site.tap.features}
        delta = sum(plain._delta(edit, acts) for edit in json.loads(f"[{spec}]"))
        torch.testing.assert_close(edited[token], hidden[token] + delta, rtol=1e-4, atol=1e-4)
        measured = site.tap.acts_TF[token].tolist()
        assert measured == pytest.approx(list(acts.values()), abs=1e-4)
        dose = float(delta.norm() / x.norm()) if isinstance(delta, torch.Tensor) else 0.0
        assert float(site.tap.doses_T[token]) == pytest.approx(dose, abs=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_captured_graphs_equals_the_path_of_the_cpu(tiny_world, spec, dtype):
    hidden, residual = stream(dtype=dtype)
    outcomes = []
    for is_native in (True, False):
        site = Site(tiny_world, is_native=is_native)
        site.tap.write_row(1, list(parse_spec(f'{{"interventions": [{spec}]}}').interventions))
        edited = site.run(hidden, residual, [0, 1, 0, 1, 1, 0])
        outcomes.append((edited, site.tap.deltas_TF[[1, 3, 4]], site.tap.doses_T[[1, 3, 4]]))
        assert torch.equal(edited[[0, 2, 5]], hidden[[0, 2, 5]])
    for some, every in zip(*outcomes, strict=True):
        tolerance = 1e-6 if some.dtype == torch.float32 else 0.0
        torch.testing.assert_close(some, every, rtol=tolerance, atol=tolerance)


def test_a_row_that_is_reused_keeps_nothing_of_its_last_use(site):
    hidden, residual = stream()
    for spec in (SPECS[6], SPECS[4]):
        site.tap.write_row(1, list(parse_spec(f'{{"interventions": [{spec}]}}').interventions))
    reused = site.run(hidden, residual, [1] * 6)
    site.tap.write_row(2, list(parse_spec(f'{{"interventions": [{SPECS[4]}]}}').interventions))
    assert torch.equal(reused, site.run(hidden, residual, [2] * 6))


def test_a_cleared_step_is_neutral(site):
    hidden, residual = stream()
    site.tap.write_row(1, list(parse_spec(f'{{"interventions": [{SPECS[0]}]}}').interventions))
    site.step.stage(np.ones(6, np.int64))
    site.step.clear()
    edited = hidden.clone()
    site.op(edited, residual, "test")
    assert torch.equal(edited, hidden)


def test_the_op_is_well_formed_for_the_compiler(site):
    hidden, residual = stream()
    torch.library.opcheck(
        site.op.default,
        (hidden, residual, "test"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_op_compiles_without_a_graph_break_and_still_edits(site):
    hidden, residual = stream()
    site.tap.write_row(1, list(parse_spec(f'{{"interventions": [{SPECS[0]}]}}').interventions))
    expected = site.run(hidden, residual, [1] * 6) * 2 + residual

    @torch.compile(fullgraph=True, backend="inductor")
    def layer(hidden, residual):
        hidden = hidden * 1.0
        site.op(hidden, residual, "test")
        return hidden * 2 + residual

    torch.testing.assert_close(layer(hidden, residual), expected)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_stream_of_zeros_is_steered_and_stays_finite(tiny_world, is_native):
    site = Site(tiny_world, is_native=is_native)
    edit = parse_spec('{"interventions": [{"feature": "direction_1", "add": 9.0}]}').interventions
    site.tap.write_row(1, list(edit))
    site.tap.write_row(2, list(edit), max_dose=0.5)
    edited = site.run(torch.zeros(2, 128), None, [1, 2])
    W_dec = torch.from_numpy(site.catalog.vectors["direction_1"].W_dec)
    torch.testing.assert_close(edited[0], 9.0 * W_dec, rtol=1e-5, atol=1e-5)
    assert edited[1].norm() < 1e-6
    assert bool(site.tap.doses_T[:2].isfinite().all())


class TestTwoPlaces:
    """A site whose transcoder reads there and writes elsewhere, on both paths, capped or not."""

    @pytest.fixture(scope="class")
    def catalog(self, tmp_path_factory):
        return store.load(oracle.world(tmp_path_factory.mktemp("places")).catalog)

    def run(self, catalog, path, max_dose):
        step = StepRows(8, torch.device("cpu"), is_native=path == "some")
        (key,) = (k for k in catalog.sites if str(k) == "mlp_in.1")
        tap = SiteTap(catalog, key, step, 4, torch.device("cpu"))
        assert tap.writes == "mlp_out"
        edits = (
            '{"feature": "transcoder_mlp_in_1", "clamp": 9.0}, '
            '{"feature": "direction_mlp_in_1", "add": 7.0}'
        )
        tap.write_row(
            1, list(parse_spec(f'{{"interventions": [{edits}]}}').interventions), max_dose
        )
        step.stage(np.array([0, 1, 1, 0, 1, 0], np.int64))
        (read, _), (written, _) = stream(seed=1), stream(seed=2)
        before = read.clone(), written.clone()
        tap(read, None)
        tap.write(written, None)
        return tap, read - before[0], written - before[1], before

    @pytest.mark.parametrize("max_dose", [None, 0.2])
    def test_each_edit_lands_where_it_belongs_and_is_capped_there(self, catalog, max_dose):
        tap, moved, added, before = self.run(catalog, "some", max_dose)
        names = [feature.name for feature in tap.features]
        place = {
            "transcoder_mlp_in_1": (added, before[1]),
            "direction_mlp_in_1": (moved, before[0]),
        }
        doses = []
        for name, (change, base) in place.items():
            delta = tap.deltas_TF[:6, names.index(name)]
            W_dec = torch.from_numpy(catalog.vectors[name].W_dec)
            torch.testing.assert_close(
                change[[1, 2, 4]], (delta.unsqueeze(1) * W_dec)[[1, 2, 4]], rtol=1e-4, atol=1e-4
            )
            assert not change[[0, 3, 5]].any()
            doses.append(change.norm(dim=1) / base.norm(dim=1))
        dose = torch.maximum(*doses)[[1, 2, 4]]
        torch.testing.assert_close(tap.doses_T[[1, 2, 4]], dose, rtol=1e-4, atol=1e-5)
        if max_dose is not None:
            assert (dose <= max_dose * 1.0001).all()
            assert (dose > max_dose * 0.9999).any()

    @pytest.mark.parametrize("max_dose", [None, 0.2])
    def test_both_paths_agree(self, catalog, max_dose):
        some, every = (self.run(catalog, path, max_dose) for path in ("some", "every"))
        for a, b in zip(some[1:3], every[1:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        at = [1, 2, 4]
        torch.testing.assert_close(some[0].deltas_TF[at], every[0].deltas_TF[at])
        torch.testing.assert_close(some[0].doses_T[at], every[0].doses_T[at])
