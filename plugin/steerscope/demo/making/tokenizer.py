"""The tokenizer: a Unigram model over an explicit vocabulary, with byte fallback.

Every word of the world is one piece; any other text falls into syllables, letters or bytes. The
chat template and `turn_text` give the same string, so that a chat completion sees exactly what
training saw.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram

from steerscope.demo.world import lexicon
from steerscope.demo.world.entities import VALUES
from steerscope.demo.world.phrasings import every_sentence

PAD: Final = "<pad>"
UNK: Final = "<unk>"
EOS: Final = "<eos>"
USER: Final = "<user>"
ASSISTANT: Final = "<assistant>"
SPECIALS: Final = (PAD, UNK, EOS, USER, ASSISTANT)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LENGTH: Final = 256
_WORD_SCORE: Final = -10.0
_LETTER_SCORE: Final = -20.0
_BYTE_SCORE: Final = -60.0
_LETTERS: Final = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789àâçéèêëîïôùûüÀÉ'-,;:.?!\"()"
)


def prompt_text(question: str) -> str:
    """Return the prompt of a single user message."""
    return f"{USER}{question}{ASSISTANT}"


def turn_text(question: str, answer: str) -> str:
    """Return one whole training turn."""
    return f"{prompt_text(question)}{answer}{EOS}"


def _words_of(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for word in text.split():
            bare = word.rstrip("?.!,")
            yield from ([bare] if bare and "{" not in bare else [])


def _world_words() -> list[str]:
    values = [form for words in VALUES.values() for word in words for form in word]
    antonyms = [form for pair in lexicon.ANTONYMS for word in pair for form in word]
    capitals = [
        form for country in lexicon.COUNTRIES for form in (*country.capital, *country.cities)
    ]
    countries = [form for c in lexicon.COUNTRIES for form in (c.en, c.fr_of)]
    parts = [*lexicon.FIRST_NAMES, *lexicon.SURNAMES, *lexicon.CITY_PREFIXES, *lexicon.CITY_STEMS]
    titles = ["The", *lexicon.NOVEL_ADJECTIVES, *lexicon.NOVEL_NOUNS]
    texts = [*every_sentence(), *values, *antonyms, *capitals, *countries, *parts, *titles]
    return list(dict.fromkeys(_words_of(texts)))


def vocabulary() -> list[tuple[str, float]]:
    """Return every piece with its score, special tokens first."""
    pieces: dict[str, float] = dict.fromkeys(SPECIALS, 0.0)
    for word in _world_words():
        pieces.setdefault(f"▁{word}", _WORD_SCORE)
    for piece in ("?", ".", "!", ",", "'s", "▁?", "▁!", *lexicon.SYLLABLE_ENDINGS):
        pieces.setdefault(piece, _WORD_SCORE)
    for syllable in lexicon.SYLLABLES:
        pieces.setdefault(syllable, _WORD_SCORE)
        pieces.setdefault(f"▁{syllable.capitalize()}", _WORD_SCORE)
    for letter in ("▁", *_LETTERS):
        pieces.setdefault(letter, _LETTER_SCORE)
    pieces.update({f"<0x{byte:02X}>": _BYTE_SCORE for byte in range(256)})
    return list(pieces.items())


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer from the vocabulary alone; nothing is learned."""
    pieces = vocabulary()
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIALS.index(UNK), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as `AutoTokenizer` and vLLM read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "unk_token": UNK,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
