"""Prompts of any length: the first characters count, the rest is told and logged shortly."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.errors import MESSAGE_CHARS, InvalidRequest
from ilf_trt.runtime.text.prompts import LOGGED_CHARS, LONGEST_PROMPT, EmbeddedText, Prompts, embed
from ilf_trt.runtime.text.tokenizer import Tokenizer
from tests.runtime.test_session import fake_model
from tests.small_tokenizer import unigram

SPEC = TextSpec(7, 512, 4, Precision.FP32)
HUGE = 1_000_000
SOON_S = 1.0
LINE_CHARS = 200 + LOGGED_CHARS
SENTENCES = ("a small cactus with a happy face", "the sea at night, waves and stars")

Texts = str | Sequence[str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    unigram(SENTENCES).save(str(path))
    return Tokenizer(path, SPEC)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    made = fake_model("rows for each block").manifest
    conditioning = Conditioning.of_text(SPEC.tokens, SPEC.channels, sized=False)
    return replace(made, spec=replace(made.spec, conditioning=conditioning), text=SPEC)


class Embedding:
    """Embeds texts with a graph that answers zeros."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest) -> None:
        self.tokenizer, self.manifest = tokenizer, manifest

    def __call__(self, prompt: Texts, negative: Texts | None = None, *, clean: bool = False) -> EmbeddedText:
        session = FakeBackend().session()
        prompts = Prompts.of(prompt, negative, clean=clean)
        return embed(prompts, self.tokenizer, SPEC, self.manifest, session, guided=True)


@pytest.fixture
def embedding(tokenizer: Tokenizer, manifest: Manifest) -> Embedding:
    return Embedding(tokenizer, manifest)


@pytest.fixture
def _soon() -> Iterator[None]:
    """The test takes less than SOON_S of its thread's own time."""
    begin = time.thread_time()
    yield
    assert time.thread_time() - begin < SOON_S


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- what is cut


@pytest.mark.parametrize("clean", [False, True], ids=["as it is", "clean"])
@pytest.mark.parametrize("unit", ["the sea ", "a", "猫", "🐈", " ", "<", "a\n\x1b[31m", "&#1"], ids=ascii)
def test_a_huge_prompt_is_cut_soon_and_logged_in_a_short_line(
    unit: str, clean: bool, embedding: Embedding, caplog: pytest.LogCaptureFixture
) -> None:
    if clean:
        pytest.importorskip("bs4")
        pytest.importorskip("ftfy")
        embedding("a", clean=True)
    text = (unit * HUGE)[:HUGE]
    begin = time.thread_time()
    with caplog.at_level(logging.WARNING):
        embedded = embedding(text, text[::-1], clean=clean)
    assert time.thread_time() - begin < SOON_S
    [cut] = embedded.cut
    assert 0 < len(cut) <= LONGEST_PROMPT
    [line] = lines_of(caplog)
    assert len(line) <= LINE_CHARS
    assert line.isprintable()


@pytest.mark.usefixtures("_soon")
def test_a_huge_prompt_is_cut_after_its_first_characters(embedding: Embedding) -> None:
    head = "a sea " * 1000
    whole, beginning = embedding(head + " a cat" * HUGE), embedding(f"{head} a cat" * 10)
    np.testing.assert_array_equal(whole.conditions["text_mask"], beginning.conditions["text_mask"])
    assert whole.cut[0].startswith(beginning.cut[0][:1000])
    assert len(whole.cut[0]) == LONGEST_PROMPT


@pytest.mark.parametrize("more", [0, 1, 5, LONGEST_PROMPT, 3 * LONGEST_PROMPT])
def test_what_is_past_the_longest_prompt_is_told(
    more: int, embedding: Embedding, caplog: pytest.LogCaptureFixture
) -> None:
    """Spaces are no tokens, so that only the length cuts."""
    prompt = "sea".ljust(LONGEST_PROMPT) + "x" * more
    with caplog.at_level(logging.WARNING):
        assert embedding(prompt).cut == ("x" * min(more, LONGEST_PROMPT),)
    assert len(lines_of(caplog)) == bool(more)


def test_a_prompt_that_fits_is_not_cut_and_logs_nothing(embedding: Embedding, caplog: pytest.LogCaptureFixture) -> None:
    assert embedding(["sea", ""], "").cut == ("", "")
    assert lines_of(caplog) == []


def test_the_same_end_is_logged_once_for_all_pictures(embedding: Embedding, caplog: pytest.LogCaptureFixture) -> None:
    long = "the sea " * 20
    with caplog.at_level(logging.WARNING):
        embedded = embedding([long, "sea", long])
    assert embedded.cut == (embedded.cut[0], "", embedded.cut[0]) != ("", "", "")
    assert len(lines_of(caplog)) == 1


@pytest.mark.fuzz
@given(text=st.text(st.characters(exclude_categories=["Cs"])), times=st.integers(1, 3 * LONGEST_PROMPT))
def test_any_prompt_gives_a_bounded_end(text: str, times: int, tokenizer: Tokenizer, manifest: Manifest) -> None:
    embedded = Embedding(tokenizer, manifest)((text * times)[: 3 * LONGEST_PROMPT])
    assert embedded.conditions["text"].shape == (1, SPEC.tokens, SPEC.channels)
    assert len(embedded.cut[0]) <= LONGEST_PROMPT


# --- what is refused

HALF = "\ud800"
UNICODE = "half of a character"


@pytest.mark.parametrize(
    ("prompt", "negative", "match"),
    [
        (HALF, None, rf"^prompt holds '\\ud800' at place 0, {UNICODE}"),
        (["a", f"b{HALF}"], None, rf"^prompt holds '\\ud800' at place 1, {UNICODE}"),
        ("a", f"\udfff{'x' * HUGE}", rf"^negative_prompt holds '\\udfff' at place 0, {UNICODE}"),
        ("\ud83d\udc08", None, UNICODE),
        (5, None, r"^prompt is 5, expected a text"),
        (b"a cat", None, r"^prompt is b'a cat', expected a text"),
        ({"a": 1}, None, "expected a text"),
        ({"a"}, None, "expected a text"),
        ([["a"]], None, r"^prompt is \['a'\], expected a text"),
        (["a", None], None, r"^prompt is None, expected a text"),
        ([5] * HUGE, None, "the most of one request"),
        ([], None, "^prompt is an empty list"),
        ("a", [], "^negative_prompt is an empty list"),
        ("a", 5, "^negative_prompt is 5, expected a text"),
        (["a", "b", "c"], ["x", "y"], "^2 negative prompts for 3 prompts"),
    ],
)
@pytest.mark.usefixtures("_soon")
def test_what_is_no_text_is_refused_in_one_line(prompt: Any, negative: Any, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as told:
        Prompts.of(prompt, negative, clean=False)
    assert str(told.value).isprintable()
    assert len(str(told.value)) <= MESSAGE_CHARS


def test_half_a_character_is_refused_as_far_as_a_prompt_is_told(embedding: Embedding) -> None:
    with pytest.raises(InvalidRequest, match=f"at place {2 * LONGEST_PROMPT - 1}, {UNICODE}"):
        embedding("a" * (2 * LONGEST_PROMPT - 1) + HALF)
    assert embedding("a" * 2 * LONGEST_PROMPT + HALF).cut[0].isascii()


def test_one_negative_prompt_is_for_all(embedding: Embedding) -> None:
    prompts = Prompts.of(iter(["a", "b"]), "x", clean=False)  # type: ignore[arg-type]
    assert (prompts.positive, prompts.negative) == (("a", "b"), ("x", "x"))
