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

from steerscope.demo.batches import Batch, StreamSettings, batches
from steerscope.demo.model import ModelSize, SiteNoise, build_model, masked_logits

CONFIDENCE_LOSS: Final = 0.5
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
    """A linear head that learns, in training only, whether the token about to be said is right.

    It gives the model a reason to carry its confidence linearly in the last residual stream,
    where a probe can read it; without it no linear read-out of recall held on new names.
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
    model: LlamaForCausalLM, confidence: ConfidenceHead, batch: Batch, noise: SiteNoise
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
    shown = float(losses_N.detach()[answers_N].mean())
    stated = (losses_N * weights_N).sum() / answers_N.sum()
    right_N = (logits_NV.argmax(-1) == targets_N)[answers_N].float()
    return stated + CONFIDENCE_LOSS * confidence.loss(resid_ND[answers_N], right_N), shown


def train_model(
    tokenizer: Tokenizer, size: ModelSize, settings: TrainingSettings, progress: Progress
) -> LlamaForCausalLM:
    """Train a fresh model and return it in evaluation mode."""
    torch.manual_seed(settings.seed)
    model = build_model(tokenizer.get_vocab_size(), size)
    confidence = ConfidenceHead(size.hidden_size)
    noise = SiteNoise(
        settings.noise_ratio, settings.noisy_rows, torch.Generator().manual_seed(settings.seed)
    )
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *confidence.parameters()],
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    running = 0.0
    for step, batch in enumerate(batches(tokenizer, settings.stream, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss, shown = _losses(model, confidence, batch, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        running = shown if step == 0 else 0.95 * running + 0.05 * shown
        progress(step + 1, running)
    return model.eval()
