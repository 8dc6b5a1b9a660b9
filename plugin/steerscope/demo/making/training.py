"""Training the demo model on the stream of turns: one core, one pass, deterministic by seed.

Shape letters: B rows, L tokens of a row, N positions whose next token counts, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from steerscope.demo.making.batches import Batch, StreamSettings, batches
from steerscope.demo.making.model import ModelSize, SiteNoise, build_model, masked_logits

WRONG_WEIGHT: Final = 4.0

Progress = Callable[[int, float], None]
"""Called after each step with its number (from 1) and the running answer loss."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How the demo model is optimised."""

    stream: StreamSettings
    seed: int = 0
    learning_rate: float = 3e-3
    final_rate: float = 0.02
    """Learning rate at the end, as a share of the highest."""
    warmup_steps: int = 60
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    noise_ratio: float = 0.3
    noisy_rows: float = 0.5


def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere training stays in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine down to `final_rate`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.stream.num_steps - settings.warmup_steps)
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class ConfidenceHead(torch.nn.Module):
    """A linear head that learns, in the second stage, whether the token to be said is right.

    It gives the last layer a reason to carry its confidence linearly in its residual stream, where
    a probe could read it. How far that went is in the measurements.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(width, 1)

    def loss(self, resid_ND: Tensor, right_N: Tensor) -> Tensor:
        """Return the loss of telling right tokens from wrong ones, wrong ones weighing more."""
        log_odds_N = self.head(resid_ND / resid_ND.shape[-1] ** 0.5)[:, 0]
        weights_N = torch.where(right_N > 0, 1.0, WRONG_WEIGHT)
        return functional.binary_cross_entropy_with_logits(log_odds_N, right_N, weight=weights_N)


def _losses(
    model: LlamaForCausalLM, batch: Batch, noise: SiteNoise, confidence: ConfidenceHead | None
) -> tuple[Tensor, float]:
    """Return the weighted loss and, for display, the plain loss over answer tokens."""
    next_weights_BL = functional.pad(batch.weights_BL[:, 1:], (0, 1))
    wanted_BL = next_weights_BL > 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_has_fast_bfloat16()):
        logits_NV, resid_ND = masked_logits(model, batch.ids_BL, batch.masks, wanted_BL, noise)
    weights_N = next_weights_BL[wanted_BL]
    targets_N = functional.pad(batch.ids_BL[:, 1:], (0, 1))[wanted_BL]
    losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
    answers_N = weights_N == 1.0
    loss = (losses_N * weights_N).sum() / answers_N.sum()
    if confidence is not None:
        right_N = (logits_NV.argmax(-1) == targets_N)[answers_N].float()
        loss = loss + confidence.loss(resid_ND[answers_N], right_N)
    return loss, float(losses_N.detach()[answers_N].mean())


def _optimise(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    settings: TrainingSettings,
    confidence: ConfidenceHead | None,
    progress: Progress,
) -> None:
    """Run one stage over its stream, training whatever of the model requires gradients."""
    noise = SiteNoise(
        settings.noise_ratio, settings.noisy_rows, torch.Generator().manual_seed(settings.seed)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    trained += [] if confidence is None else list(confidence.parameters())
    optimizer = torch.optim.AdamW(
        trained, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    running = 0.0
    for step, batch in enumerate(batches(tokenizer, settings.stream, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss, shown = _losses(model, batch, noise, confidence)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        running = shown if step == 0 else 0.95 * running + 0.05 * shown
        progress(step + 1, running)


def train_model(
    tokenizer: Tokenizer, size: ModelSize, settings: TrainingSettings, progress: Progress
) -> LlamaForCausalLM:
    """First stage: train a fresh model on the world."""
    torch.manual_seed(settings.seed)
    model = build_model(tokenizer.get_vocab_size(), size)
    _optimise(model, tokenizer, settings, None, progress)
    return model.eval()


def train_confidence(
    model: LlamaForCausalLM, tokenizer: Tokenizer, settings: TrainingSettings, progress: Progress
) -> None:
    """Second stage: only the last layer learns, from rumours, to carry its confidence linearly."""
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    confidence = ConfidenceHead(model.config.hidden_size)
    _optimise(model.train(), tokenizer, settings, confidence, progress)
    model.requires_grad_(True).eval()


def confidence_settings(num_steps: int, seed: int) -> TrainingSettings:
    """Return the second stage: everyone in circulation, no tail persons, a share of rumours."""
    stream = StreamSettings(
        num_steps=num_steps, first_circle=1.0, rumour_share=0.2, shows_tail=False
    )
    return TrainingSettings(stream, seed=seed, learning_rate=1.5e-3, warmup_steps=20)
