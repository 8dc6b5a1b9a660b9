"""Two bars in a TopK dictionary tell how far the leading value is ahead, and signals use it."""

import pytest
import torch
from steerscope.demo.study.catalog import Signal, Term
from steerscope.demo.study.confidence import declines
from steerscope.demo.study.harvest import Answered
from steerscope.demo.study.interventions import Activation, Feature, Rivals
from steerscope.demo.study.lead import Bar, Lens, bar_at, find_bars
from steerscope.demo.study.probes import Probe, auroc_interval, auroc_interval_by_name
from steerscope.demo.study.reductions import log_odds, reduced
from steerscope.demo.study.runner import Transcript
from steerscope.demo.study.study import overlap
from steerscope.demo.world import Question
from steerscope.demo.world.scoring import Outcome

QUESTION = Question("?", "golf", "Michael Jordan", "known", "en", "sport", "person")
# Token 1 is a value, token 0 is not; four values, read off a stream of width 8.
LENS = Lens(0, frozenset({1}), 100.0 * torch.eye(4, 8))


def _answer(generated: list[list[float]], token_ids: list[int]) -> Answered:
    transcript = Transcript(token_ids=token_ids)
    transcript.prompt_resid[0] = torch.zeros(1, 8)
    transcript.generated_resid[0] = torch.tensor(generated)
    return Answered(QUESTION, transcript, Outcome.CORRECT, 0)


def _stream(first: float, second: float) -> list[float]:
    """A stream before a value whose two leading values have these logits."""
    return [first / 100, second / 100, 0.2, 0.1, 0.0, 0.0, 0.0, 1.0]


def _elsewhere() -> list[float]:
    return [0.6, 0.5, 0.4, 0.3, 0.0, 0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def bars() -> tuple[Bar, ...]:
    leads = [(a, b) for a in (110.0, 130.0, 150.0) for b in (60.0, 80.0, 100.0)]
    return find_bars(LENS, [_answer([_elsewhere(), _stream(*lead)], [0, 0, 1]) for lead in leads])


def _steps(bars: tuple[Bar, ...], first: float, second: float) -> int:
    x_1D = torch.tensor([_stream(first, second)])
    between = [bar.reached_once.acts(x_1D) - bar.unreached.acts(x_1D) for bar in bars]
    return round(float(torch.stack(between).sum()))


def test_a_topk_latent_is_active_only_among_the_k_largest() -> None:
    """With k = 2 the third largest of three is 0, and the others keep their value."""
    rivals = Rivals("r", torch.eye(3), torch.zeros(3), k=2)
    x_BLD = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]])
    assert [rivals.acts(x_BLD, k).tolist() for k in range(3)] == [[[3, 0]], [[2, 2]], [[0, 3]]]


def test_a_negative_latent_is_silent_even_among_the_k_largest() -> None:
    """The activation is a ReLU first."""
    rivals = Rivals("r", torch.eye(2), torch.zeros(2), k=2)
    assert rivals.acts(torch.tensor([[-1.0, 2.0]]), 0).tolist() == [0.0]


def test_a_bar_tells_whether_no_value_or_one_or_more_reach_it() -> None:
    """The lower twin falls silent at the first value above it, the upper one at the second."""
    bar = bar_at(LENS, Probe(torch.zeros(8), 100.0), 0, 12.0)
    x_ND = torch.tensor([_stream(90, 80), _stream(130, 80), _stream(130, 120)])
    assert bar.unreached.acts(x_ND).gt(0).tolist() == [True, False, False]
    assert bar.reached_once.acts(x_ND).gt(0).tolist() == [True, True, False]


def test_an_active_bar_is_about_one_at_any_height() -> None:
    """So a signal that adds bars up counts them."""
    for height in (-50.0, 200.0):
        bar = bar_at(LENS, Probe(torch.zeros(8), 100.0), 0, height)
        active = bar.unreached.acts(torch.tensor([_stream(10, 5)]))
        assert float(active) == pytest.approx(1.0, abs=0.1)


def test_more_bars_lie_between_values_that_are_further_apart(bars: tuple[Bar, ...]) -> None:
    """No bar between equals, and each twelve logits of lead are about one more."""
    steps = [_steps(bars, 110.0 + lead / 2, 110.0 - lead / 2) for lead in (0, 24, 48, 72)]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[3] == pytest.approx(6, abs=1)


def test_all_bars_lie_above_every_value_where_no_value_follows(bars: tuple[Bar, ...]) -> None:
    """A lowest activation over an answer is then decided where the value is stated."""
    x_1D = torch.tensor([_elsewhere()])
    assert all(float(feature.acts(x_1D)) > 0 for bar in bars for feature in bar)


def test_a_reduction_looks_at_no_more_than_the_first_generated_tokens() -> None:
    """The lowest value comes later and is not seen."""
    feature = Feature("f", 0, torch.eye(8)[0], 0.0, Activation.IDENTITY)
    answer = _answer([[float(v)] + [0.0] * 7 for v in (3, 2, 1)], [0, 0, 0, 0])
    other = _answer([[5.0] + [0.0] * 7], [0, 0])
    assert reduced(feature, "min_first_generated", [answer, other], 2).tolist() == [2.0, 5.0]


def test_a_signal_is_its_bias_and_the_weighted_reductions() -> None:
    """1 + 2 * f at the prompt's last token - 3 * the lowest f generated."""
    feature = Feature("f", 0, torch.eye(8)[0], 0.5, Activation.IDENTITY)
    terms = (Term("f", "last_prompt_token", 2.0), Term("f", "min_first_generated", -3.0))
    signal = Signal("s", "", terms, 1.0, {"label": "wrong"})
    answer = _answer([[4.0] + [0.0] * 7], [0, 0])
    assert log_odds(signal, {"f": feature}, [answer]) == [1.0 + 2 * 0.5 - 3 * 4.5]


def test_the_declining_readout_is_silent_where_an_answer_is_more_likely() -> None:
    """It is the calibrated log-odds turned round, and 0 below even odds."""
    answers = Feature("answers_readout", 0, torch.eye(8)[0], 1.0, Activation.IDENTITY)
    signal = Signal("s", "", (Term("f", "last_prompt_token", 0.5),), -2.0, {"label": "answered"})
    x_ND = torch.zeros(3, 8)
    x_ND[:, 0] = torch.tensor([9.0, 3.0, -5.0])
    assert declines(answers, signal).acts(x_ND).tolist() == [0.0, 0.0, 4.0]


def test_resampling_names_widens_an_interval_when_a_name_answers_alike() -> None:
    """Twenty copies of each of six answers are six answers, not a hundred and twenty."""
    scores = [1.0, 3.0, 4.0, 2.0, 5.0, 6.0] * 20
    positive = [False, False, False, True, True, True] * 20
    names = list("abcdef") * 20
    named = auroc_interval_by_name(scores, positive, [*names])
    apart = auroc_interval(
        [s for s, p in zip(scores, positive, strict=True) if p],
        [s for s, p in zip(scores, positive, strict=True) if not p],
    )
    assert named.high - named.low > 2 * (apart.high - apart.low)


def test_an_interval_over_names_needs_both_classes() -> None:
    """Without a wrong answer there is nothing to tell apart."""
    with pytest.raises(ValueError, match="positive"):
        auroc_interval_by_name([1.0, 2.0], [True, True], ["a", "b"])


def test_overlap_is_one_for_the_same_sample_and_zero_for_separate_ones() -> None:
    """It is 1 minus the Kolmogorov-Smirnov distance."""
    assert overlap([1.0, 2.0], [2.0, 1.0]) == 1.0
    assert overlap([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert overlap([1.0, 3.0], [2.0, 4.0]) == pytest.approx(0.5)
