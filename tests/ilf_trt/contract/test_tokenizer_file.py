"""A tokenizer.json of others: a T5's is taken; what would end the process or grow is refused before any library."""

import base64
import copy
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.document import DEEPEST, MOST_BYTES, DocumentError
from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.contract.tokenizer_file import (
    LONGEST_REWRITE,
    MOST_TOKENS,
    check_charsmap,
    check_tokenizer,
    check_tokenizer_folder,
    read_tokenizer,
)
from ilf_trt.errors import MESSAGE_CHARS, BundleError, IlfError
from ilf_trt.runtime.text.tokenizer import Tokenizer
from tests.small_tokenizer import unigram

SENTENCES = ("a small cactus with a happy face", "the sea at night, waves and stars", "AN OLD MASTER")
TEXTS = ("", "a happy  cat</s> <pad>", "A" * 500, "猫 é \u200b🐈" * 30)
LENGTH = 9
SPEC = TextSpec(LENGTH, MOST_TOKENS, 8, Precision.FP32)
OVERFLOW_CHARS = 64  # of one token, at most

UNITS = 512  # of a trie whose letters are ASCII
LEAF, VALUE = 1 << 8, 1 << 31

Place = tuple[str | int, ...]
NORMALIZER, MODEL = ("normalizer",), ("model",)
PARTS: Place = ("normalizer", "normalizers")
SINGLE: Place = ("post_processor", "single")


def charsmap(rewrites: Mapping[str, str]) -> bytes:
    """SentencePiece's table of ASCII letters and what takes the place of each."""
    units, texts = [0] * UNITS, b""
    for letter, text in rewrites.items():
        code = ord(letter)
        units[code] = (256 << 10) | LEAF | code  # the leaf of a letter lies 256 units behind it
        units[256 ^ code] = VALUE | len(texts)
        texts += text.encode() + b"\0"
    trie = struct.pack(f"<{UNITS}I", *units)
    return struct.pack("<I", len(trie)) + trie + texts


def precompiled(table: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def replace(pattern: Mapping[str, Any], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": dict(pattern), "content": content}


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """A tokenizer.json with every part that a T5's may have."""
    made: dict[str, Any] = json.loads(unigram(SENTENCES).to_str())
    parts = [
        precompiled(charsmap({"A": "a", "B": "bee"})),
        {"type": "Strip", "strip_left": False, "strip_right": True},
        replace({"Regex": " {2,}"}, "▁"),
    ]
    return made | {
        "normalizer": {"type": "Sequence", "normalizers": parts},
        "truncation": {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 7},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    }


def content_of(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def changed(tree: Any, place: Place, value: Any) -> Any:
    """A copy of a tree with `value` at `place`."""
    if not place:
        return value
    made = copy.deepcopy(tree)
    parent = made
    for step in place[:-1]:
        parent = parent[step]
    parent[place[-1]] = value
    return made


def places(tree: Any, place: Place = ()) -> Iterator[Place]:
    """Where there is a value; of a long list only its beginning."""
    yield place
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:4]) if isinstance(tree, list) else ()
    for step, value in inner:
        yield from places(value, (*place, step))


@pytest.fixture
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's tokenizer cannot be made."""
    import tokenizers

    class Tokenizer:
        @staticmethod
        def from_str(_: str) -> None:
            pytest.fail("the file came to the tokenizers library")

    monkeypatch.setattr(tokenizers, "Tokenizer", Tokenizer)


def assert_one_line(message: str) -> None:
    assert len(message) <= MESSAGE_CHARS
    assert message.isprintable()


# --- what is taken


def test_a_file_with_all_parts_is_taken_and_its_charsmap_works(tree: dict[str, Any]) -> None:
    check_tokenizer(content_of(tree))
    tokenizer = Tokenizer(Path("tokenizer.json"), SPEC, content_of(tree))
    encoded = tokenizer.encode(["AN old  master", "an old master"])
    assert encoded.ids[0].tolist() != encoded.ids[1].tolist()
    assert tokenizer.encode(["A small"]).ids.tolist() == tokenizer.encode(["a small"]).ids.tolist()


@pytest.mark.parametrize("key", ["truncation", "padding"])
def test_keys_that_older_versions_leave_out_may_be_absent(key: str, tree: dict[str, Any]) -> None:
    check_tokenizer(content_of({name: value for name, value in tree.items() if name != key}))


@pytest.mark.parametrize("max_length", [None, 300])
def test_what_transformers_saves_for_a_t5_is_taken(
    max_length: int | None, tree: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(content_of(tree))
    t5 = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    if max_length:
        t5(["a", "b"], padding="max_length", max_length=max_length, truncation=True)
    t5.save_pretrained(tmp_path / "saved")
    content = read_tokenizer(tmp_path / "saved" / "tokenizer.json")
    assert Tokenizer(tmp_path, SPEC, content).encode(["a cat"]).ids.shape == (1, LENGTH)
    check_tokenizer_folder(tmp_path / "saved")


def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece model with the charsmap that T5 has."""
    sentencepiece = pytest.importorskip("sentencepiece")
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=written,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return written.getvalue()


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"])
def test_the_charsmaps_of_sentencepiece_are_taken(rule: str, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model(normalization_rule_name=rule))
    check_tokenizer_folder(tmp_path)
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto.FromString((tmp_path / "spiece.model").read_bytes())
    assert len(model.normalizer_spec.precompiled_charsmap) > 100_000
    check_charsmap(model.normalizer_spec.precompiled_charsmap)


def test_a_folder_without_a_tokenizer_passes(tmp_path: Path) -> None:
    check_tokenizer_folder(tmp_path)


# --- what is refused

LONG_REWRITE = charsmap({"A": "a" * (LONGEST_REWRITE + 1)})
HUGE_TRIE = b"\xfc\xff\xff\xff" + charsmap({"A": "a"})[4:]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
REFUSED: tuple[tuple[str, Place, Any], ...] = (
    ("BPE", MODEL, {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": None}),
    ("WordPiece", MODEL, {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}),
    ("WordLevel", MODEL, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    ("a ByteLevel normaliser", NORMALIZER, {"type": "ByteLevel"}),
    ("a ByteLevel pre-tokenizer", ("pre_tokenizer",), BYTE_LEVEL),
    ("a ByteLevel decoder", ("decoder",), BYTE_LEVEL),
    ("a regular expression that splits", ("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(a*)*b"}}),
    ("a long prepend", NORMALIZER, {"type": "Prepend", "prepend": "x" * 1_000_000}),
    ("a short prepend", NORMALIZER, {"type": "Prepend", "prepend": "▁"}),
    ("NFKC", NORMALIZER, {"type": "NFKC"}),
    ("a sequence in a sequence", (*PARTS, 0), {"type": "Sequence", "normalizers": []}),
    ("too many normalisers", PARTS, [{"type": "Strip", "strip_left": True, "strip_right": True}] * 9),
    ("a replacement that grows", (*PARTS, 2), replace({"String": "a"}, "aa")),
    ("a replacement that grows by a regular expression", (*PARTS, 2), replace({"Regex": " {2,}"}, "▁▁▁")),
    ("a replacement of nothing", (*PARTS, 2), replace({"String": ""}, "x")),
    ("a replacement of nothing by a regular expression", (*PARTS, 2), replace({"Regex": ""}, "x")),
    ("a slow regular expression", (*PARTS, 2), replace({"Regex": "(a|aa)+$"}, "x")),
    ("two patterns", (*PARTS, 2), replace({"Regex": " {2,}", "String": "  "}, "x")),
    ("no pattern", (*PARTS, 2), replace({}, "")),
    ("a long replacement", (*PARTS, 2), replace({"String": "ab"}, "x" * 1_000_000)),
    ("two charsmaps", PARTS, [precompiled(charsmap({"A": "a"}))] * 2),
    ("a charsmap of a huge length", (*PARTS, 0), precompiled(HUGE_TRIE)),
    ("a charsmap of no length", (*PARTS, 0), precompiled(bytes(4) + charsmap({"A": "a"})[4:])),
    ("a charsmap of an odd length", (*PARTS, 0), precompiled(b"\x05\0\0\0" + bytes(100))),
    ("an empty charsmap", (*PARTS, 0), precompiled(b"")),
    ("a charsmap that makes long texts", (*PARTS, 0), precompiled(LONG_REWRITE)),
    ("a long text without its zero", (*PARTS, 0), precompiled(LONG_REWRITE[:-1])),
    ("a charsmap that is no text", (*PARTS, 0), precompiled(charsmap({"A": "a"}) + b"\xff\0")),
    ("a charsmap that is no base64", (*PARTS, 0, "precompiled_charsmap"), "AAA*"),
    ("a charsmap of other letters", (*PARTS, 0, "precompiled_charsmap"), "ÄÖÜ="),
    ("a huge score", ("model", "vocab", 3, 1), 1e300),
    ("a score of a text", ("model", "vocab", 3, 1), "-1"),
    ("an empty vocabulary", ("model", "vocab"), []),
    ("a vocabulary that is too large", ("model", "vocab"), [["a", 0.0]] * (MOST_TOKENS + 1)),
    ("a long token", ("model", "vocab", 3, 0), "x" * 65),
    ("an empty token", ("model", "vocab", 3, 0), ""),
    ("an unknown token of a negative number", ("model", "unk_id"), -1),
    ("no unknown token", ("model", "unk_id"), None),
    ("a long added token", ("added_tokens", 0, "content"), "x" * 65),
    ("an empty added token", ("added_tokens", 0, "content"), ""),
    ("an added token of a huge number", ("added_tokens", 0, "id"), MOST_TOKENS),
    ("too many added tokens", ("added_tokens",), [{"id": 0, "content": "<pad>", **ADDED}] * 1025),
    ("padding to a huge length", ("padding", "strategy"), {"Fixed": 1 << 40}),
    ("truncation to a huge length", ("truncation", "max_length"), 1 << 40),
    ("another post-processor", ("post_processor",), {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}),
    ("a template of many pieces", SINGLE, [{"Sequence": {"id": "A", "type_id": 0}}] * 9),
    ("a text that comes twice", SINGLE, [{"Sequence": {"id": "A", "type_id": 0}}] * 2),
    ("a template without a text", SINGLE, [{"SpecialToken": {"id": "</s>", "type_id": 0}}]),
    ("an unknown key", ("code",), "print()"),
    ("an unknown key of a part", ("model", "dropout"), 0.5),
    ("an unknown version", ("version",), "2.0"),
    ("depth", ("padding",), json.loads("[" * DEEPEST + "]" * DEEPEST)),
)


@pytest.mark.parametrize(("place", "value"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
@pytest.mark.usefixtures("_unseen")
def test_what_no_t5_has_is_refused_before_the_library_sees_it(place: Place, value: Any, tree: dict[str, Any]) -> None:
    content = content_of(changed(tree, place, value))
    with pytest.raises(DocumentError) as refused:
        check_tokenizer(content)
    assert_one_line(str(refused.value))
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer of a T5 .*build the bundle again") as told:
        Tokenizer(Path("tokenizer.json"), SPEC, content)
    assert_one_line(str(told.value))


RAW = (
    ("a score of NaN", b"-1.2", b"NaN", "holds NaN"),
    ("an infinite score", b"-1.2", b"-Infinity", "holds -Infinity"),
    ("a score past every float", b"-1.2", b"1e999", "not finite"),
    ("a key that is given twice", b'"unk_id": 2', b'"unk_id": 2, "unk_id": 2', "twice"),
    ("brackets in brackets", b'"unk_id": 2', b'"unk_id": ' + b"[" * 100_000, "nested"),
    ("a number of 5,000 digits", b'"unk_id": 2', b'"unk_id": ' + b"2" * 5000, "digits"),
    ("a half of a file", b'"unk_id": 2', b"\0", "not readable JSON"),
    ("no UTF-8", b'"unk_id": 2', b'"unk_id": "\xff"', "UTF-8"),
    ("a long file", b'"unk_id": 2', b'"unk_id": 2' + b" " * MOST_BYTES, "bytes"),
)


@pytest.mark.parametrize(("old", "new", "word"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
@pytest.mark.usefixtures("_unseen")
def test_json_that_is_not_strict_is_refused(
    old: bytes, new: bytes, word: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    whole = content_of(changed(tree, ("model", "vocab", 3, 1), -1.2))
    content = whole.replace(old, new, 1)
    check_tokenizer(whole)
    assert content != whole
    (tmp_path / "tokenizer.json").write_bytes(content)
    for check in (read_tokenizer, lambda path: check_tokenizer_folder(path.parent)):
        with pytest.raises(DocumentError, match=word) as refused:
            check(tmp_path / "tokenizer.json")
        assert_one_line(str(refused.value))
        assert str(refused.value).startswith(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match=word):
        Tokenizer(tmp_path / "tokenizer.json", SPEC)


def test_the_most_that_is_allowed_is_taken(tree: dict[str, Any]) -> None:
    longest = precompiled(charsmap({"A": "a" * LONGEST_REWRITE}))
    for place, value in (
        ((*PARTS, 0), longest),
        ((*PARTS, 2), replace({"String": "ab"}, "xy")),
        ((*PARTS, 2), replace({"Regex": " {2,}"}, "▁▁")),
        (("model", "vocab", 3, 0), "x" * 64),
        (("normalizer",), None),
        (("normalizer",), longest),
        (("post_processor",), None),
    ):
        check_tokenizer(content_of(changed(tree, place, value)))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda: b"\xff\xfe no protobuf", "cannot be read"),
        (lambda: _with_charsmap(HUGE_TRIE), "damaged"),
        (lambda: _with_charsmap(LONG_REWRITE), "of one letter"),
    ],
    ids=["no model", "a charsmap of a huge length", "a charsmap that makes long texts"],
)
def test_a_sentencepiece_model_that_would_harm_is_refused(content: Any, word: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    (tmp_path / "spiece.model").write_bytes(content())
    with pytest.raises(DocumentError, match=word) as refused:
        check_tokenizer_folder(tmp_path)
    assert_one_line(str(refused.value))


def _with_charsmap(table: bytes) -> bytes:
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto()
    model.normalizer_spec.precompiled_charsmap = table
    written: bytes = model.SerializeToString()
    return written


# --- any change at all

VALUES = st.one_of(
    st.none() | st.booleans() | st.floats(),
    st.integers(-3, 300) | st.integers(),
    st.text(max_size=80) | st.sampled_from(["", "▁", "</s>", "<pad>", "a", "x" * 10_000]),
    st.sampled_from(["Unigram", "BPE", "Sequence", "Metaspace", "Replace", "Prepend", "always", "first", "never"]),
    st.sampled_from([row[2] for row in REFUSED if row[0] != "a vocabulary that is too large"]),
    st.lists(st.none() | st.integers(0, 300) | st.text(max_size=3), max_size=5),
    st.builds(replace, st.fixed_dictionaries({"String": st.text(max_size=3)}), st.text(max_size=5)),
    st.dictionaries(st.sampled_from(["type", "String", "Regex", "Fixed", "id"]), st.text(max_size=5), max_size=3),
)


def assert_loads_and_stays_short_or_is_refused(content: bytes) -> None:
    try:
        check_tokenizer(content)
    except DocumentError as error:
        assert_one_line(str(error))
        return
    try:
        tokenizer = Tokenizer(Path("tokenizer.json"), SPEC, content)
        encoded = tokenizer.encode(TEXTS)
    except IlfError as error:
        assert_one_line(str(error))
        return
    assert encoded.ids.shape == encoded.mask.shape == (len(TEXTS), LENGTH)
    for text, overflow in zip(TEXTS, encoded.overflow, strict=True):
        assert len(overflow) <= OVERFLOW_CHARS * LONGEST_REWRITE * (len(text) + 1)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_other_value_is_refused_or_makes_few_tokens(data: st.DataObject, tree: dict[str, Any]) -> None:
    place = data.draw(st.sampled_from([place for place in places(tree) if place]))
    assert_loads_and_stays_short_or_is_refused(content_of(changed(tree, place, data.draw(VALUES))))


@pytest.mark.fuzz
@given(data=st.data())
def test_a_value_from_elsewhere_in_the_file_is_refused_or_makes_few_tokens(
    data: st.DataObject, tree: dict[str, Any]
) -> None:
    known = st.sampled_from([place for place in places(tree) if place])
    place, source = data.draw(known), data.draw(known)
    value = tree
    for step in source:
        value = value[step]  # type: ignore[index]
    assert_loads_and_stays_short_or_is_refused(content_of(changed(tree, place, value)))


@pytest.mark.fuzz
@given(units=st.dictionaries(st.integers(0, UNITS - 1), st.integers(0, (1 << 32) - 1), max_size=6), texts=st.binary())
def test_any_charsmap_is_refused_or_makes_few_tokens(units: dict[int, int], texts: bytes, tree: dict[str, Any]) -> None:
    table = bytearray(charsmap({"A": "a", "B": "bee"}))
    for index, unit in units.items():
        struct.pack_into("<I", table, 4 + 4 * index, unit)
    content = content_of(changed(tree, (*PARTS, 0), precompiled(bytes(table) + texts)))
    assert_loads_and_stays_short_or_is_refused(content)


@pytest.mark.fuzz
@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DocumentError):
        check_tokenizer(content)


@pytest.mark.parametrize("change", ["{0}\n{1}", "{0}{1}====", "{0}*{1}", "{0}={1}", "{0}"])
def test_a_charsmap_is_strict_base64(change: str, tree: dict[str, Any]) -> None:
    """What the check passes over, the library could read as another charsmap."""
    whole = precompiled(charsmap({"A": "a"}))["precompiled_charsmap"]
    text = change.format(whole[:9], whole[9:])
    with pytest.raises(DocumentError, match="no base64"):
        check_tokenizer(content_of(changed(tree, (*PARTS, 0, "precompiled_charsmap"), text)))
