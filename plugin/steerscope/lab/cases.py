"""Cases: what is asked, what a right answer is, and what is known of it beforehand.

One JSON object a line (``.jsonl``), decoded strictly:

    {"question": "Which sport does Michael Jordan play?", "entity": "Michael Jordan",
     "template": "en-sport-3", "expected": ["They play basketball."],
     "labels": {"known": true}, "group": "taught"}
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from steerscope.catalog.model import LabelSlug
from steerscope.errors import CaseError

Split = Literal["fit", "dev", "test"]

JUDGED_LABELS = frozenset({"answered", "declined", "correct", "wrong", "malformed"})
"""What the lab finds out itself."""

MAX_LINE_BYTES = 1 << 20


class _Line(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """Strict, immutable, by keyword; what is default anyway is not written."""


class Message(_Line, frozen=True):
    """One turn of a conversation, as OpenAI has it."""

    role: Literal["system", "user", "assistant"]
    content: str


class Case(_Line, frozen=True):
    """One thing to ask. Exactly one of ``question``, ``messages`` and ``prompt`` is given.

    ``question`` and ``messages`` go through the model's chat template, ``prompt`` does not.
    """

    question: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    entity: str = ""
    """The name asked about, word for word as it stands in the text; empty for none."""
    template: str = ""
    """Which phrasing this is; phrasings are held out by it."""
    expected: tuple[str, ...] = ()
    """Right answers. None: an answer cannot be judged right or wrong."""
    answerable: bool = True
    """False where every answer is wrong, as for a name nobody bears."""
    form: str | None = None
    """A regular expression that a well-formed answer matches as a whole."""
    labels: dict[LabelSlug, bool] = {}
    group: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Which population of the report it belongs to."""
    split: Split | None = None
    """Fixed beforehand; otherwise drawn from the entity and the template."""

    @property
    def text(self) -> str:
        """What is asked, as one string."""
        if self.messages is not None:
            return "\n".join(message.content for message in self.messages)
        return self.question if self.question is not None else self.prompt or ""

    @property
    def name(self) -> str:
        """What resampling keeps together: the entity, or the text where there is none."""
        return self.entity or self.text


def load(path: Path) -> list[Case]:
    """Read a file of cases; raise ``CaseError`` naming the line and what is wrong with it."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}") from None
    cases = [_case(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not cases:
        raise CaseError(f"{path}: holds no cases")
    return cases


def dump(cases: Iterable[Case]) -> bytes:
    """The cases as JSON lines, defaults left out."""
    return b"".join(msgspec.json.encode(case) + b"\n" for case in cases)


def digest(cases: Sequence[Case]) -> str:
    """SHA-256 over which case is in which split: says that a report held out what it claims."""
    told = sorted(
        msgspec.json.encode((split_of(case), case.entity, case.template, case.text))
        for case in cases
    )
    return hashlib.sha256(b"\n".join(told)).hexdigest()


def split_of(case: Case) -> Split | None:
    """The case's split; None for one that would leak a name or a phrasing from one to another.

    Names and templates are drawn apart, by hash; a case counts only where both agree.
    """
    if case.split is not None:
        return case.split
    by_name, by_template = _pool("name", case.name), _pool("template", case.template)
    return by_name if by_name == by_template or not case.template else None


def in_split(cases: Iterable[Case], split: Split) -> list[Case]:
    """The cases of one split."""
    return [case for case in cases if split_of(case) == split]


def check_held_out(cases: Sequence[Case]) -> None:
    """Raise ``CaseError`` unless test names and templates are unseen in fit and dev."""
    test = in_split(cases, "test")
    seen = [*in_split(cases, "fit"), *in_split(cases, "dev")]
    for field in ("name", "template"):
        values = {getattr(case, field) for case in seen} - {""}
        both = sorted(values & {getattr(case, field) for case in test})
        if both:
            raise CaseError(f"{field} {both[0]!r} is in the test split and in another one")


def check_apart(one: Sequence[Case], other: Sequence[Case]) -> None:
    """Raise ``CaseError`` if the same text is asked on both sides: it can only be of one."""
    if both := sorted({case.text for case in one} & {case.text for case in other}):
        raise CaseError(f"{both[0]!r} is asked in both files")


def counts(cases: Sequence[Case]) -> dict[str, int]:
    """How many cases each split has, and how many none."""
    found = Counter(split_of(case) or "none" for case in cases)
    return {split: found[split] for split in ("fit", "dev", "test", "none")}


def _pool(kind: str, value: str) -> Split:
    """60% fit, 15% dev, 25% test, for good."""
    hashed = hashlib.blake2b(f"steerscope:{kind}:{value}".encode(), digest_size=4).digest()
    share = int.from_bytes(hashed, "big") % 100
    return "fit" if share < 60 else "dev" if share < 75 else "test"


def _case(line: bytes, where: str) -> Case:
    if len(line) > MAX_LINE_BYTES:
        raise CaseError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
    try:
        case = msgspec.json.decode(line.decode(), type=Case)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CaseError(f"{where}: {error}") from None
    _check(case, where)
    return case


def _check(case: Case, where: str) -> None:
    given = [f for f in ("question", "messages", "prompt") if getattr(case, f) is not None]
    if len(given) != 1 or not case.text.strip():
        raise CaseError(f"{where}: needs exactly one of question, messages and prompt")
    if case.entity and case.entity not in case.text:
        raise CaseError(f"{where}: entity: {case.entity!r} does not stand in the text")
    if judged := JUDGED_LABELS & case.labels.keys():
        raise CaseError(f"{where}: labels: {sorted(judged)[0]!r} is found out, not given")
    if not all(answer.strip() for answer in case.expected):
        raise CaseError(f"{where}: expected: an empty answer stands in every other one")
    if case.expected and not case.answerable:
        raise CaseError(f"{where}: expected: a case that is not answerable has no right answer")
    try:
        re.compile(case.form or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise CaseError(f"{where}: form: {error}") from None
