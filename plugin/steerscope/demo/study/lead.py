"""Does one value lead when a value is stated? Read in the residual stream, without logits.

What tells a wrong answer from a right one in this model is the distance between the two values it
would rather say. No linear probe reads a distance between the two largest of hundreds of numbers;
a TopK dictionary does. Its latents are the unembedding rows of all values that an answer can
state (a logit lens) and two bars: linear functions of the same stream, fitted to lie between the
two leading values. With k = 2 the lower bar is active only where no value reaches it, the upper
one, a little above, only where at most one value does. Several dictionaries with their bars at
different heights measure the distance in steps.

Shape letters: N tokens, D width, K latents, V values.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from steerscope.demo.study.harvest import Answered
from steerscope.demo.study.interventions import Activation, Feature, Rivals
from steerscope.demo.study.probes import Probe
from steerscope.demo.world import LANGUAGES, side_pairs
from steerscope.demo.world.entities import VALUES
from steerscope.demo.world.phrasings import Attribute

# In raw logits: neither divided by the stream's norm nor scaled.
NUM_BARS: Final = 8
_STEP: Final = 12.0
_GAP: Final = 50.0
_BETWEEN_TWINS: Final = 1.0
_SCALE: Final = 4096.0
_L2: Final = 1e-2


class Lens(NamedTuple):
    """The unembedding rows of every value that an answer can state, at the last layer."""

    layer: int
    tokens: frozenset[int]
    rows_VD: Tensor

    def leading(self, x_ND: Tensor) -> Tensor:
        """Return the logits [N, 2] of the two leading values, the norm's scale left out."""
        return (x_ND @ self.rows_VD.T).topk(2, -1).values


class Bar(NamedTuple):
    """Two features of one dictionary; active is about 1, inactive is 0."""

    unreached: Feature
    """Active where no value reaches the bar."""
    reached_once: Feature
    """Active where at most one value does."""


def value_lens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> Lens:
    """Take the last piece of each value; the final norm's weight is folded in."""
    about: tuple[Attribute, ...] = ("antonym", "capital")
    words = [getattr(v, spoken) for vs in VALUES.values() for v in vs for spoken in LANGUAGES]
    words += [said for spoken in LANGUAGES for a in about for _, said in side_pairs(a, spoken)]
    tokens = sorted({encoding.ids[-1] for encoding in tokenizer.encode_batch(words)})
    rows_VD = (model.lm_head.weight[tokens] * model.model.norm.weight).detach().float()
    return Lens(model.config.num_hidden_layers - 1, frozenset(tokens), rows_VD)


def _generated(lens: Lens, answers: Sequence[Answered]) -> tuple[Tensor, Tensor]:
    """Stack the generated tokens' streams [N, D], and whether a value follows each [N]."""
    streams = [a.transcript.generated_resid[lens.layer] for a in answers]
    follows = [t in lens.tokens for a in answers for t in a.transcript.token_ids[1:]]
    return torch.cat(streams), torch.tensor(follows)


def fit_bar(lens: Lens, answers: Sequence[Answered]) -> Probe:
    """Fit the bar: midway between the two leading values before a value, above all elsewhere."""
    x_ND, value_N = _generated(lens, answers)
    leading_N2 = lens.leading(x_ND)
    mean_D, scale_D = x_ND.mean(0), x_ND.std(0) + 1e-6
    z_ND = (x_ND - mean_D) / scale_D
    weight_D = torch.zeros(x_ND.shape[1], requires_grad=True)
    bias = torch.tensor(100.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        bar_N = z_ND @ weight_D + bias
        midway = (bar_N - leading_N2.mean(1))[value_N].square().mean()
        below = (leading_N2[:, 0] + _GAP - bar_N)[~value_N].relu().square().mean()
        loss = midway + below + _L2 * weight_D.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    unscaled_D = weight_D.detach() / scale_D
    return Probe(unscaled_D, float(bias.detach()) - float(mean_D @ unscaled_D))


def find_bars(lens: Lens, answers: Sequence[Answered]) -> tuple[Bar, ...]:
    """Return the bars from the lowest to the highest, each with its own dictionary."""
    fitted = fit_bar(lens, answers)
    heights = [_STEP * (index - (NUM_BARS - 1) / 2) for index in range(NUM_BARS)]
    return tuple(bar_at(lens, fitted, index, height) for index, height in enumerate(heights))


def bar_at(lens: Lens, fitted: Probe, index: int, height: float) -> Bar:
    """Build one dictionary: all values, then the bar and its twin.

    A shift of every bias alike keeps all activations near 1, whatever the bar's height.
    """
    num_values = len(lens.rows_VD)
    rows_KD = torch.cat([lens.rows_VD, fitted.weight_D.expand(2, -1)]) / _SCALE
    bias_K = torch.zeros(num_values + 2)
    bias_K[-2:] = torch.tensor([fitted.bias + height, fitted.bias + height + _BETWEEN_TWINS])
    rivals = Rivals(f"values_and_bar_{index}", rows_KD, 1.0 + bias_K / _SCALE, k=2)
    return Bar(
        _latent(f"bar_{index}_unreached", lens.layer, rivals, num_values),
        _latent(f"bar_{index}_reached_once", lens.layer, rivals, num_values + 1),
    )


def _latent(name: str, layer: int, rivals: Rivals, latent: int) -> Feature:
    return Feature(
        name,
        layer,
        rivals.W_enc_KD[latent],
        float(rivals.b_enc_K[latent]),
        Activation.TOPK,
        rivals=rivals,
        latent=latent,
    )
