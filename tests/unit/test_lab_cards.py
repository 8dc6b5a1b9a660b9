"""Feature cards: whole pages whatever a token holds, and every number on them."""

import dataclasses
import re

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")
pytest.importorskip("matplotlib", reason="the lab's extra is not installed")
pytest.importorskip("markdown_it", reason="rich brings it")

from lab_world import feature
from markdown_it import MarkdownIt
from steerscope.catalog.model import Activation, FeatureKind, LabelSource
from steerscope.demo.paths import MODEL_DIR
from steerscope.lab import cards, markdown
from steerscope.lab.explain import Example, Explanation, token_text
from steerscope.lab.unembedding import Promoted, Unembedding
from transformers import AutoTokenizer

NASTY = [
    "|", "`", "``", "\n", "\r\n", " \n\n", "**", "_", "](x)", "<script>", "\\", "\\|", "#", "\t",
    "\u2028", "\x00", "\u200b", " ", "  ", "", "$x$", "~~", "&amp;", "- ", "é", "🙂", "⏎",
]  # fmt: skip


def example(tokens, peak=0, activation=3.25, generated=False):
    return Example(activation, tuple(tokens), (0.0,) * len(tokens), peak, generated)


def explanation(**more):
    told = {
        "examples": [example([" Michael", " Jordan", " plays"], 1)],
        "num_tokens": 12_000,
        "num_active": 345,
        "values": np.r_[np.zeros(900), np.linspace(0.5, 4, 100)].astype(np.float32),
        "promoted": Promoted(((3, 1.25), (4, 0.5)), ((5, -2.0), (6, -1.0))),
        "tokens_of": {3: " sure", 4: " who", 5: " play", 6: "s"},
    }
    entry = feature(
        "known_entity",
        Activation.JUMPRELU,
        label="Known entity",
        description="Fires at the last token of names the model knows.",
        label_source=LabelSource.AUTOMATIC,
        source={"sae": "resid_post.3-192-seed0", "latent": "17"},
        evidence={"auroc": 0.98, "steering": {"toward_positive": {"edited": 0.91}}, "none": {}},
    )
    return Explanation(entry, True, **(told | more))


CARD = cards.card(explanation())


def test_a_card_tells_everything():
    for told in (
        "# known_entity",
        "**Known entity** (label given by a program, not reviewed)",
        "Fires at the last token of names the model knows.",
        "sae_latent, jumprelu, read and steered",
        "resid_post, layer 1",
        "2.88% of 12,000 tokens",
        "- `3.25` …Michael <b>\\[Jordan\\]</b> plays…",
        "| ␣sure | +1.25 | ␣play | -2.00 |",
        "| ␣who | +0.50 | s | -1.00 |",
        "- auroc: 0.98",
        "- steering:\n  - toward\\_positive:\n    - edited: 0.91",
        "- sae: resid\\_post.3-192-seed0",
        "- latent: 17",
        "![Activations of known_entity](known_entity.png)",
    ):
        assert told in CARD, told


def test_a_card_is_the_same_every_time(tmp_path):
    assert cards.card(explanation()) == CARD
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        cards.write(tmp_path / folder, [explanation()])
    for path in (tmp_path / "one" / "cards").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "cards" / path.name).read_bytes()


def rendered(page):
    """The page through a real parser: its elements in order, and each inline text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
    texts = [
        "".join("<b>" if c.type == "html_inline" else c.content for c in t.children)
        for t in tokens
        if t.type == "inline"
    ]
    return [token.type for token in tokens], texts


@pytest.mark.parametrize("token", NASTY)
def test_no_token_breaks_the_page(token):
    told = [" Michael", token, " plays"]
    page = cards.card(
        explanation(
            examples=[example(told, 0), example(told, 1), example(told, 1, generated=True)],
            tokens_of={3: token, 4: f" {token}", 5: f"{token} ", 6: "s"},
        )
    )
    plain = ["a", "b", "c"]
    whole = cards.card(
        explanation(examples=[example(plain, 0), example(plain, 1), example(plain, 1, 0, True)])
    )
    (elements, texts), (expected, _) = rendered(page), rendered(whole)
    assert elements == expected
    for text in texts:
        assert not re.search(r"[\x00-\x1f\u2028\u200b]", text)
    seen = token.strip(" \n\r\t\x00\u2028\u200b")
    lines = [text for text in texts if "Michael" in text]
    assert len(lines) == 3
    for line in lines:
        assert seen in line
        assert line.count("<b>[") == line.count("]<b>") == 1
        assert line.startswith(("3.25 …", "3.25 (generated) …"))


def test_the_highest_token_stands_out_inside_a_word():
    page = cards.card(explanation(examples=[example([" Jor", "dan", "*"], 1)]))
    assert "3.25 …Jor<b>[dan]<b>*…" in rendered(page)[1]


@pytest.mark.parametrize("token", [t for t in NASTY if t.strip(" ")])
def test_the_highest_token_is_never_empty(token):
    line = cards.card(explanation(examples=[example(["a", token], 1)]))
    assert re.search(r"<b>\\\[.+\\\]</b>", line)


def test_blank_tokens_can_be_seen():
    assert [markdown.token(t) for t in (" ", "  ", " a", "a ", "\n", "\t", "\u200b", "")] == [
        "␣", "␣␣", "␣a", "a␣", "⏎", "\\\\t", "\\\\u200b", "",
    ]  # fmt: skip


def test_labels_sources_and_evidence_are_text():
    entry = feature(
        "odd", label="a|b\n# c", source={"sae": "x|y\nz"}, evidence={"why": "`1`\n- 2", "n": [1, 2]}
    )
    told = dataclasses.replace(explanation(), feature=entry)
    page = cards.card(told)
    assert rendered(page)[0].count("heading_open") == rendered(CARD)[0].count("heading_open")
    for line in ("**a\\|b⏎# c** (label given by a person)", "- sae: x\\|y⏎z",
                 "- why: \\`1\\`⏎- 2", "- n: \\[1, 2\\]"):  # fmt: skip
        assert line in page


def test_a_read_only_feature_has_nothing_to_write():
    page = cards.card(
        dataclasses.replace(explanation(), steers=False, promoted=None, examples=[], tokens_of={})
    )
    assert "read only" in page
    assert "What it writes" not in page
    assert "Where it is highest" not in page


@pytest.mark.parametrize(
    ("active", "told"),
    [(0, "0% of"), (1, "0.00833% of"), (120, "1% of"), (11_999, "100% of"), (12_000, "100% of")],
)
def test_density_is_a_plain_percentage(active, told):
    assert told in cards.card(dataclasses.replace(explanation(), num_active=active))


def test_the_density_of_a_signed_feature_is_only_a_sign():
    entry = feature("way", Activation.IDENTITY, kind=FeatureKind.DIRECTION)
    page = cards.card(dataclasses.replace(explanation(), feature=entry))
    assert "2.88% of 12,000 tokens above zero (its sign only)" in page


def test_the_folder_has_a_page_and_a_picture_a_feature_and_an_index(tmp_path):
    silent = dataclasses.replace(
        explanation(values=np.zeros(5, np.float32), examples=[], num_active=0, num_tokens=0),
        feature=feature("silent", label="Never | on"),
    )
    written = cards.write(tmp_path, [explanation(), silent])
    assert {path.name for path in written} == {
        "known_entity.md", "known_entity.png", "silent.md", "silent.png", "README.md",
    }  # fmt: skip
    assert all(path.stat().st_size > 0 for path in written)
    index = (tmp_path / "cards" / "README.md").read_text(encoding="utf-8")
    assert "| [silent](silent.md) | Never \\| on | resid_post.1 | 0% of 0 tokens |" in index
    for path in written:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8") if path.suffix == ".md"
                               else ""):  # fmt: skip
            assert (tmp_path / "cards" / link).exists()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_a_token_is_told_as_it_stands_in_text(tokenizer):
    for text in ("Where was Michael Jordan born?", "Où est née Ada ?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        told = [token_text(tokenizer, token) for token in ids]
        assert "".join(told).strip() == text
    assert " " in {t[0] for t in told}


def test_a_part_of_a_letter_is_told_as_one(tokenizer):
    ids = tokenizer("Ç", add_special_tokens=False)["input_ids"]
    told = {token_text(tokenizer, token) for token in ids}
    assert told - {" "} == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_are_told_by_name_and_ids_without_a_token_by_number(tokenizer):
    assert token_text(tokenizer, tokenizer.eos_token_id) == tokenizer.eos_token
    assert len(tokenizer) < 1536, "the embedding is padded"
    assert token_text(tokenizer, 1535) == "<1535>"


def test_the_embedded_models_tokens_fill_a_card(tokenizer):
    step_D = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    promoted = Unembedding(MODEL_DIR).of(step_D, 10)
    ids = [t for t, _ in (*promoted.promoted, *promoted.suppressed)]
    names = {token: token_text(tokenizer, token) for token in ids}
    page = cards.card(explanation(promoted=promoted, tokens_of=names))
    assert page.count("\n| ") >= 10
