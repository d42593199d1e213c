"""Prompts become the same tokens as by transformers' T5 tokenizer, at any length and from several threads."""

import json
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.errors import BundleError, InvalidRequest, MissingDependency
from ilf_trt.runtime.text.tokenizer import Tokenizer
from tests.ilf_trt.contract.test_tokenizer_file import charsmap, precompiled
from tests.small_tokenizer import unigram

VOCABULARY = 512
THREADS = 4
ROUNDS = 50

SENTENCES = (
    "a small cactus with a happy face in the sahara desert.",
    "a painting of a small cat that sleeps on a window, in the style of an old master",
    "the sea at night, waves and stars, a light far away",
    "café, naïve, straße: words with letters that others lack",
)
PROMPTS = (
    "",
    " ",
    "a cat",
    "  a cat,\tasleep \n on the sea  ",
    "a small cactus with a happy face in the sahara desert.",
    "Кошка на окне",
    "قطة نائمة",
    "一只猫 a cat 猫",
    "🐈 a café 👩\u200d🚀 ﬁre \u200b",
    "a cat</s>on <extra_id_0> <pad> a sea <unk>",
    "the sea " * 200,
    "\u732b" * 300,
)


def spec_of(tokens: int, vocabulary: int = VOCABULARY) -> TextSpec:
    return TextSpec(tokens, vocabulary, 8, Precision.FP32)


@pytest.fixture(scope="module")
def t5() -> Any:
    """A small Unigram tokenizer with the pipeline of T5."""
    return unigram(SENTENCES)


@pytest.fixture(scope="module")
def file(t5: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    t5.save(str(path))
    return path


@pytest.fixture(scope="module")
def reference(file: Path) -> Any:
    """The same tokenizer in transformers; it makes a pipeline of its own from what it reads, so save it again."""
    transformers = pytest.importorskip("transformers", reason="transformers' tokenizer is the reference")
    return transformers.T5TokenizerFast.from_pretrained(file.parent)


@pytest.fixture
def saved(reference: Any, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path)
    return tmp_path / "tokenizer.json"


@pytest.fixture
def changed(file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tokenizer.json with other values for some of its keys."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return path

    return write


@pytest.mark.parametrize("length", [1, 2, 7, 32, 300])
def test_ids_and_mask_equal_those_of_transformers(length: int, reference: Any, saved: Path) -> None:
    encoded = Tokenizer(saved, spec_of(length)).encode(PROMPTS)
    wanted = reference(
        list(PROMPTS),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="np",
    )
    assert (encoded.ids.dtype, encoded.mask.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(encoded.ids, wanted.input_ids)
    np.testing.assert_array_equal(encoded.mask, wanted.attention_mask)


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_what_was_cut_is_what_diffusers_warns_of(length: int, reference: Any, saved: Path) -> None:
    encoded = Tokenizer(saved, spec_of(length)).encode(PROMPTS)
    for prompt, overflow in zip(PROMPTS, encoded.overflow, strict=True):
        whole = reference([prompt], padding="longest").input_ids[0]
        wanted = reference.decode(whole[length - 1 : -1]) if len(whole) > length else ""
        assert overflow == wanted, ascii(prompt)


def test_a_prompt_that_is_cut_is_closed_and_one_that_fits_is_padded(file: Path) -> None:
    encoded = Tokenizer(file, spec_of(6)).encode(["the sea " * 20, "sea"])
    assert encoded.ids[0, -1] == 1
    assert encoded.mask[0].tolist() == [1] * 6
    tokens = int(encoded.mask[1].sum())
    assert encoded.ids[1].tolist()[tokens - 1 :] == [1] + [0] * (6 - tokens)
    assert encoded.overflow[0].endswith("the sea")
    assert encoded.overflow[1] == ""


def test_a_prompt_of_exactly_the_length_is_not_cut(file: Path) -> None:
    tokens = int(Tokenizer(file, spec_of(64)).encode(["a happy cat"]).mask.sum())
    assert Tokenizer(file, spec_of(tokens)).encode(["a happy cat"]).overflow == ("",)
    assert Tokenizer(file, spec_of(tokens - 1)).encode(["a happy cat"]).overflow != ("",)


def test_the_files_own_truncation_and_padding_give_way(file: Path, t5: Any, tmp_path: Path) -> None:
    other = type(t5).from_str(t5.to_str())
    other.enable_truncation(3, stride=1, strategy="only_first", direction="left")
    other.enable_padding(direction="left", pad_id=2, pad_token="<unk>", length=5, pad_to_multiple_of=8)
    other.save(str(tmp_path / "own.json"))
    own, wanted = (Tokenizer(path, spec_of(12)).encode(PROMPTS) for path in (tmp_path / "own.json", file))
    np.testing.assert_array_equal(own.ids, wanted.ids)
    np.testing.assert_array_equal(own.mask, wanted.mask)
    assert own.overflow == wanted.overflow


def test_threads_that_encode_at_once_get_what_one_gets(file: Path) -> None:
    tokenizer = Tokenizer(file, spec_of(9))
    wanted = {prompt: tokenizer.encode([prompt]) for prompt in PROMPTS}

    def agrees(prompt: str) -> bool:
        got = tokenizer.encode([prompt])
        return np.array_equal(got.ids, wanted[prompt].ids) and got.overflow == wanted[prompt].overflow

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(agrees, PROMPTS * ROUNDS))


def test_no_prompts_are_no_rows(file: Path) -> None:
    encoded = Tokenizer(file, spec_of(9)).encode([])
    assert (encoded.ids.shape, encoded.mask.shape, encoded.overflow) == ((0, 9), (0, 9), ())


def test_one_text_in_place_of_a_list_is_refused(file: Path) -> None:
    with pytest.raises(InvalidRequest, match="give a list of prompts"):
        Tokenizer(file, spec_of(9)).encode("a cat")


@pytest.mark.parametrize("prompt", [None, 3, b"a cat", ["a", "cat"], "a \ud800 cat"], ids=ascii)
def test_a_prompt_that_is_no_text_is_refused(prompt: Any, file: Path) -> None:
    with pytest.raises(InvalidRequest, match="is no text"):
        Tokenizer(file, spec_of(9)).encode([prompt])


def test_a_missing_file_says_what_to_do(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*none\.json: No such file.*; build the bundle again"):
        Tokenizer(tmp_path / "none.json", spec_of(9))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"], ids=repr)
def test_a_broken_file_says_what_to_do(content: bytes, file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.json is no tokenizer .*; build the bundle again"):
        Tokenizer(tmp_path / "broken.json", spec_of(9))


def test_a_file_that_closes_no_text_is_refused(changed: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"not the tokenizer of a T5: it ends a text with \[\]"):
        Tokenizer(changed(post_processor=None), spec_of(9))


def test_a_file_without_padding_is_refused(file: Path, changed: Callable[..., Path]) -> None:
    renamed = json.loads(file.read_text().replace("<pad>", "<none>"))
    with pytest.raises(BundleError, match=r"not the tokenizer of a T5: .* and lacks <pad>"):
        Tokenizer(changed(**renamed), spec_of(9))


def test_more_tokens_than_the_encoder_knows_are_refused(file: Path, t5: Any) -> None:
    known = t5.get_vocab_size()
    Tokenizer(file, spec_of(9, known))
    with pytest.raises(BundleError, match=f"tokens up to {known - 1}, the text encoder has {known - 1}"):
        Tokenizer(file, spec_of(9, known - 1))


def test_without_tokenizers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"need tokenizers; pip install 'ilf-trt\[text\]'"):
        Tokenizer(tmp_path / "tokenizer.json", spec_of(9))


class PanicException(BaseException):
    """As pyo3 raises it: not an Exception, and of a class that cannot be imported."""


class Raising:
    """The tokenizers library with a method that raises."""

    def __init__(self, inner: Any, method: str, error: BaseException) -> None:
        self._inner, self._method, self._error = inner, method, error

    def from_str(self, text: str) -> "Raising":
        if self._method == "from_str":
            raise self._error
        return Raising(self._inner.from_str(text), self._method, self._error)

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise self._error
        return getattr(self._inner, name)


LONG = "index out of bounds:\n\x1b[31m" + "x" * 10_000
LOADING = ("from_str", "no_truncation", "enable_padding", "get_vocab")


@pytest.fixture
def raising(file: Path, t5: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], Tokenizer]:
    """Opens the file with a library of which one method raises; after loading, if loading calls it too."""

    def tokenizer(method: str, error: BaseException) -> Tokenizer:
        if method in LOADING:
            monkeypatch.setattr("tokenizers.Tokenizer", Raising(type(t5), method, error))
            return Tokenizer(file, spec_of(3))
        made = Tokenizer(file, spec_of(3))
        made._tokenizer = Raising(made._tokenizer, method, error)
        return made

    return tokenizer


@pytest.mark.parametrize("method", LOADING)
@pytest.mark.parametrize("error", [PanicException(LONG), ValueError(LONG), Exception(LONG), PanicException()], ids=repr)
def test_a_panic_on_loading_is_the_bundles_error(
    method: str, error: BaseException, raising: Callable[[str, BaseException], Tokenizer]
) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer \(.+\); build the bundle again") as told:
        raising(method, error)
    assert str(told.value).isprintable()
    assert told.value.__cause__ is error


@pytest.mark.parametrize(("method", "word"), [("encode", "is no text"), ("decode", "the end of a prompt")])
@pytest.mark.parametrize("error", [PanicException(LONG), TypeError(LONG)], ids=["panic", "error"])
def test_a_panic_on_a_prompt_is_refused_in_one_line(
    method: str, word: str, error: BaseException, raising: Callable[[str, BaseException], Tokenizer]
) -> None:
    with pytest.raises(InvalidRequest, match=word) as told:
        raising(method, error).encode(["the sea " * 20])
    assert str(told.value).isprintable()
    assert told.value.__cause__ is error


@pytest.mark.parametrize("method", [*LOADING, "encode", "decode"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_an_interrupt_inside_of_the_library_passes(
    method: str, error: BaseException, raising: Callable[[str, BaseException], Tokenizer]
) -> None:
    with pytest.raises(type(error)) as passed:
        raising(method, error).encode(["the sea " * 20])
    assert passed.value is error


def test_a_real_panic_of_the_library_is_translated(file: Path, changed: Callable[..., Path]) -> None:
    """A charsmap whose trie leads out of itself; the check of the file does not follow tries."""
    table = bytearray(charsmap({"A": "a"}))
    struct.pack_into("<I", table, 4 + 4 * ord("B"), (1 << 31) - 256 | ord("B"))
    tokenizer = Tokenizer(changed(normalizer=precompiled(bytes(table))), spec_of(9))
    with pytest.raises(InvalidRequest, match="is no text"):
        tokenizer.encode(["a B cat"])
    assert tokenizer.encode(["a cat"]).ids.shape == (1, 9)
