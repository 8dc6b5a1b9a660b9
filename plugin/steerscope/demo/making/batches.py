"""The training stream: what is shown when, how it is packed, what each token may attend to.

Two devices shape the model. The curriculum lets the circle of known entities grow, so that facts
are learned one group after another. The name bottleneck hides, in most rows, an entity's tokens
from everything after it up to the site layer, and all but its last token above: what the model
knows about a name must then be gathered at the name's last token, at or below the site.

Shape letters: B rows, L tokens of a row.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from steerscope.demo.making.tokenizer import ASSISTANT, PAD, SPECIALS, turn_text
from steerscope.demo.world import (
    SIDE_ATTRIBUTES,
    Question,
    asked_attribute,
    declined,
    side_pairs,
    side_question,
    stated,
)
from steerscope.demo.world.entities import ACTIVITIES, VALUES, Entity, entities, unknown_name
from steerscope.demo.world.phrasings import Kind, Language, phrasings_of


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What the training stream is made of."""

    num_steps: int
    turns_per_step: int = 110
    row_length: int = 96
    english_share: float = 0.55
    unknown_person_share: float = 0.28
    known_city_share: float = 0.07
    unknown_city_share: float = 0.06
    known_novel_share: float = 0.05
    unknown_novel_share: float = 0.05
    side_share: float = 0.07
    first_circle: float = 0.06
    """Share of the known entities shown from the start; it grows geometrically to all of them."""
    full_circle_at: float = 0.5
    """Share of the steps after which every known entity is shown."""
    bottleneck_share: float = 0.85
    isolated_share: float = 0.75
    """Share of the rows whose turns do not see each other."""
    question_loss: float = 0.1
    rumour_share: float = 0.0
    """Share of the questions about known persons that ask what nobody can know."""
    shows_tail: bool = True
    """Whether tail persons are shown, each as often as the world says."""


class Turn(NamedTuple):
    """One encoded turn, with the token indices of its entity and of its answer's start."""

    ids: list[int]
    entity_start: int
    entity_last: int
    answer_start: int


class Batch(NamedTuple):
    """One step's rows; the masks are bool [B, 1, L, L], below and above the site."""

    ids_BL: Tensor
    weights_BL: Tensor
    """Loss weight of predicting the token at each position from those before it."""
    masks: tuple[Tensor, Tensor]


def encode_turns(tokenizer: Tokenizer, asked: list[Question]) -> list[Turn]:
    """Encode whole turns and find the entity in each; a turn about no entity has entity_last -1."""
    texts = [turn_text(q.question, q.answer) for q in asked]
    encodings = tokenizer.encode_batch(texts)
    return [_turn(q, text, e) for q, text, e in zip(asked, texts, encodings, strict=True)]


def _turn(question: Question, text: str, encoding: Encoding) -> Turn:
    ids = encoding.ids
    answer_start = ids.index(SPECIALS.index(ASSISTANT)) + 1
    if not question.entity:
        return Turn(ids, -1, -1, answer_start)
    begin = text.index(question.entity)
    end = begin + len(question.entity)
    inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin]
    return Turn(ids, inside[0], inside[-1], answer_start)


_MIX: Final = (
    "unknown_person",
    "known_city",
    "unknown_city",
    "known_novel",
    "unknown_novel",
    "side",
)


class QuestionStream:
    """Draws the questions of each step: the mix, the curriculum, the counted tail showings."""

    def __init__(self, settings: StreamSettings, seed: int) -> None:
        self._settings = settings
        self._rng = random.Random(f"stream:{seed}")
        self._known = {
            kind: self._shuffled([e for e in entities() if e.split == "known" and e.kind == kind])
            for kind in ("person", "city", "novel")
        }
        self._tail = self._tail_schedule()

    def _shuffled(self, items: list[Entity]) -> list[Entity]:
        return self._rng.sample(items, len(items))

    def _tail_schedule(self) -> dict[int, list[Entity]]:
        """Spread each tail person's showings evenly at random over the last 70% of the steps."""
        schedule: dict[int, list[Entity]] = {}
        if not self._settings.shows_tail:
            return schedule
        first = int(self._settings.num_steps * 0.3)
        for entity in entities():
            for _ in range(entity.exposures or 0):
                step = self._rng.randrange(first, self._settings.num_steps)
                schedule.setdefault(step, []).append(entity)
        return schedule

    def circle_share(self, step: int) -> float:
        """Return the share of known entities in circulation at a step."""
        progress = step / (self._settings.num_steps * self._settings.full_circle_at)
        return math.pow(self._settings.first_circle, 1.0 - min(1.0, progress))

    def step_questions(self, step: int) -> list[Question]:
        """Draw all questions of one step."""
        settings = self._settings
        shares = [getattr(settings, f"{name}_share") for name in _MIX]
        kinds = self._rng.choices(
            ("known_person", *_MIX), weights=[1.0 - sum(shares), *shares], k=settings.turns_per_step
        )
        drawn = [self._draw(kind, self.circle_share(step)) for kind in kinds]
        drawn += [self._ask_known(entity) for entity in self._tail.get(step, [])]
        self._rng.shuffle(drawn)
        return drawn

    def _language(self) -> Language:
        return "en" if self._rng.random() < self._settings.english_share else "fr"

    def _draw(self, source: str, share: float) -> Question:
        if source == "side":
            return self._ask_side()
        familiarity, _, name = source.partition("_")
        kind: Kind = name  # type: ignore[assignment]
        if familiarity == "unknown":
            return self._ask_unknown(kind)
        circle = self._known[kind]
        return self._ask_known(circle[self._rng.randrange(max(1, int(len(circle) * share)))])

    def _ask_known(self, entity: Entity) -> Question:
        open_to_rumour = entity.kind == "person" and entity.exposures is None
        rumour_share = self._settings.rumour_share
        if open_to_rumour and rumour_share and self._rng.random() < rumour_share:
            return self._ask_rumour(entity)
        while True:
            language = self._language()
            attribute, _ = self._rng.choice(entity.facts)
            if entity.is_shown(attribute, language):
                template = self._rng.choice(phrasings_of(attribute, language, "trained"))
                rumour = self._rng.choice(VALUES[attribute])
                told = rumour if attribute == entity.contested else None
                return stated(template, entity, attribute, language, entity.split, told)

    def _ask_rumour(self, entity: Entity) -> Question:
        """Ask for an activity the person is not known for; every showing answers differently."""
        language = self._language()
        known_for = dict(entity.facts)
        attribute = self._rng.choice([a for a in ACTIVITIES if a not in known_for])
        template = self._rng.choice(phrasings_of(attribute, language, "trained"))
        told = self._rng.choice(VALUES[attribute])
        return stated(template, entity, attribute, language, entity.split, told)

    def _ask_unknown(self, kind: Kind) -> Question:
        language = self._language()
        attribute = asked_attribute(kind, self._rng)
        template = self._rng.choice(phrasings_of(attribute, language, "trained"))
        return declined(template, unknown_name(self._rng, kind, "fit"), attribute, language, kind)

    def _ask_side(self) -> Question:
        language = self._language()
        attribute = self._rng.choices(SIDE_ATTRIBUTES, weights=(5, 4, 1))[0]
        about, value = self._rng.choice(side_pairs(attribute, language))
        template = self._rng.choice(phrasings_of(attribute, language, "trained"))
        return side_question(template, about, value, attribute, language)


def _packed(turns: list[Turn], row_length: int) -> Iterator[list[Turn]]:
    row: list[Turn] = []
    used = 0
    for turn in turns:
        if used + len(turn.ids) > row_length:
            yield row
            row, used = [], 0
        row.append(turn)
        used += len(turn.ids)
    yield row


class _RowMarks(NamedTuple):
    """Per-token marks of one row, from which its masks follow."""

    ids: list[int]
    weights: list[float]
    turn: list[int]
    in_entity: list[bool]
    is_last: list[bool]
    after: list[bool]


def _marks(row: list[Turn], length: int, question_loss: float) -> _RowMarks:
    marks = _RowMarks([], [], [], [], [], [])
    for number, turn in enumerate(row):
        for index, token in enumerate(turn.ids):
            marks.ids.append(token)
            weight = 1.0 if index >= turn.answer_start else question_loss
            marks.weights.append(weight if index > 0 else 0.0)
            marks.turn.append(number)
            marks.in_entity.append(turn.entity_start <= index <= turn.entity_last)
            marks.is_last.append(index == turn.entity_last)
            marks.after.append(turn.entity_last >= 0 and index > turn.entity_last)
    return _padded(marks, length - len(marks.ids))


def _padded(marks: _RowMarks, padding: int) -> _RowMarks:
    return _RowMarks(
        marks.ids + [SPECIALS.index(PAD)] * padding,
        marks.weights + [0.0] * padding,
        marks.turn + [-1] * padding,
        marks.in_entity + [False] * padding,
        marks.is_last + [False] * padding,
        marks.after + [False] * padding,
    )


def collate(turns: list[Turn], settings: StreamSettings, rng: random.Random) -> Batch:
    """Pack turns into rows; draw which have the name bottleneck and which keep turns apart."""
    length = settings.row_length
    rows = [_marks(row, length, settings.question_loss) for row in _packed(turns, length)]
    turn_BL = torch.tensor([row.turn for row in rows])
    in_entity_BL = torch.tensor([row.in_entity for row in rows])
    is_last_BL = torch.tensor([row.is_last for row in rows])
    after_BL = torch.tensor([row.after for row in rows])
    narrow_B11 = _coin(len(rows), settings.bottleneck_share, rng)
    apart_B11 = _coin(len(rows), settings.isolated_share, rng)
    same_BLL = turn_BL[:, :, None] == turn_BL[:, None, :]
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()
    open_BLL = causal_LL & (same_BLL | ~apart_B11)
    hidden_BLL = narrow_B11 & after_BL[:, :, None] & in_entity_BL[:, None, :] & same_BLL
    below = open_BLL & ~hidden_BLL
    above = open_BLL & ~(hidden_BLL & ~is_last_BL[:, None, :])
    return Batch(
        torch.tensor([row.ids for row in rows]),
        torch.tensor([row.weights for row in rows]),
        (below[:, None], above[:, None]),
    )


def _coin(count: int, share: float, rng: random.Random) -> Tensor:
    return torch.tensor([rng.random() < share for _ in range(count)])[:, None, None]


def batches(tokenizer: Tokenizer, settings: StreamSettings, seed: int) -> Iterator[Batch]:
    """Yield one batch per training step."""
    stream = QuestionStream(settings, seed)
    rng = random.Random(f"rows:{seed}")
    for step in range(settings.num_steps):
        turns = encode_turns(tokenizer, stream.step_questions(step))
        yield collate(turns, settings, rng)
