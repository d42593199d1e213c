"""A tokenizer.json of others: only what transformers writes for a T5 reaches the tokenizers library.

That library trusts its files: some end the process, others make a short text grow without a bound.
"""

import binascii
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ilf_trt.contract.document import MOST_BYTES, DocumentError, as_type, parse_json
from ilf_trt.errors import one_line
from ilf_trt.files import read_bytes

MOST_TOKENS = 1 << 18  # the largest T5, umT5, has 256,384
LONGEST_REWRITE = 40  # bytes that a charsmap may make of one letter; T5's longest are the 33 of U+FDFA
REWRITTEN = {" {2,}": 2}  # the regular expressions that may be replaced, and the shortest text that each matches
SPIECE = "spiece.model"

Text = Annotated[str, Meta(min_length=1, max_length=64)]
Short = Annotated[str, Meta(max_length=16)]
Mark = Literal["\u2581"]  # SentencePiece's sign for a space
Id = Annotated[int, Meta(ge=0, lt=MOST_TOKENS)]
Length = Annotated[int, Meta(ge=0, le=1 << 20)]
Side = Literal["Left", "Right"]


class Part(Struct, forbid_unknown_fields=True, tag_field="type", tag=True):
    """A part of the file that names its kind; the fields of each kind are the library's."""


class Entry(Struct, forbid_unknown_fields=True):
    """A part of the file without a kind."""


class Precompiled(Part):
    precompiled_charsmap: str


class Strip(Part):
    strip_left: bool
    strip_right: bool


class Replace(Part):
    pattern: Annotated[
        dict[Literal["String", "Regex"], Annotated[Short, Meta(min_length=1)]], Meta(min_length=1, max_length=1)
    ]
    content: Short


Normalizer = Precompiled | Strip | Replace


class Normalizers(Part, tag="Sequence"):
    normalizers: Annotated[list[Normalizer], Meta(max_length=8)]


class WhitespaceSplit(Part):
    pass


class Metaspace(Part):
    replacement: Mark
    prepend_scheme: Literal["always", "first", "never"] = "always"
    split: bool | None = None
    add_prefix_space: bool | None = None
    str_rep: Mark | None = None


class PreTokenizers(Part, tag="Sequence"):
    pretokenizers: Annotated[list[WhitespaceSplit | Metaspace], Meta(max_length=4)]


class Piece(Entry):
    id: Text
    type_id: Literal[0, 1]


class SpecialToken(Entry):
    id: Text
    ids: Annotated[list[Id], Meta(min_length=1, max_length=4)]
    tokens: Annotated[list[Text], Meta(min_length=1, max_length=4)]


Template = Annotated[
    list[Annotated[dict[Literal["Sequence", "SpecialToken"], Piece], Meta(min_length=1, max_length=1)]],
    Meta(max_length=8),
]


class TemplateProcessing(Part):
    single: Template
    pair: Template
    special_tokens: Annotated[dict[Text, SpecialToken], Meta(max_length=8)]


class Unigram(Part):
    unk_id: Id
    vocab: Annotated[
        list[tuple[Text, Annotated[float, Meta(ge=-1e6, le=1e6)]]], Meta(min_length=1, max_length=MOST_TOKENS)
    ]
    byte_fallback: bool = False


class AddedToken(Entry):
    id: Id
    content: Text
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class Truncation(Entry):
    max_length: Length
    stride: Length
    strategy: Literal["LongestFirst", "OnlyFirst", "OnlySecond"]
    direction: Side = "Right"


class Padding(Entry):
    strategy: Literal["BatchLongest"] | Annotated[dict[Literal["Fixed"], Length], Meta(min_length=1)]
    direction: Side
    pad_to_multiple_of: Length | None
    pad_id: Id
    pad_type_id: Id
    pad_token: Text


class TokenizerFile(Entry):
    """The whole file."""

    version: Literal["1.0"]
    added_tokens: Annotated[list[AddedToken], Meta(max_length=1024)]
    normalizer: Normalizer | Normalizers | None
    pre_tokenizer: WhitespaceSplit | Metaspace | PreTokenizers
    post_processor: TemplateProcessing | None
    decoder: Metaspace
    model: Unigram
    truncation: Truncation | None = None
    padding: Padding | None = None

    def check(self) -> None:
        """Raise DocumentError where a text could grow without a bound, or would not end as a T5 expects."""
        parts = self.normalizer.normalizers if isinstance(self.normalizer, Normalizers) else [self.normalizer]
        charsmaps = [part.precompiled_charsmap for part in parts if isinstance(part, Precompiled)]
        if len(charsmaps) > 1:
            raise DocumentError(f"has {len(charsmaps)} charsmaps, expected one at most")
        for charsmap in charsmaps:
            try:
                check_charsmap(binascii.a2b_base64(charsmap, strict_mode=True))
            except ValueError as error:
                raise DocumentError(f"has a charsmap that is no base64 ({one_line(error)})") from error
        for part in parts:
            if isinstance(part, Replace):
                _check_replace(part)
        if self.post_processor is not None:
            pieces = [next(iter(piece)) for piece in self.post_processor.single]
            if pieces != ["Sequence", "SpecialToken"]:
                raise DocumentError(f"makes {pieces} of a text, expected the text and one token")


def read_tokenizer(path: Path) -> bytes:
    """The content of a tokenizer.json, checked; raises DocumentError, with the path and no advice."""
    try:
        content = read_bytes(path, most=MOST_BYTES)
        check_tokenizer(content)
    except DocumentError as error:
        raise DocumentError(error.reason, path) from error
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot be read: {one_line(error)}", path) from error
    return content


def check_tokenizer(content: bytes) -> None:
    """Raise DocumentError for a tokenizer.json that is not of the kinds and sizes of a T5's."""
    if len(content) > MOST_BYTES:
        raise DocumentError(f"has {len(content)} bytes, at most {MOST_BYTES} are read")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"is not UTF-8 text: {one_line(error)}") from error
    as_type(parse_json(text), TokenizerFile).check()


def check_charsmap(charsmap: bytes) -> None:
    """Raise DocumentError for a charsmap of SentencePiece that the library cannot hold.

    A charsmap is the size of a trie, the trie, and the texts that take the place of letters, each with a zero behind.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size == 0 or size % 4 or size > len(charsmap) - 4:
        raise DocumentError(f"has a charsmap of {len(charsmap)} bytes with a trie of {size}; it is damaged")
    texts = charsmap[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError("has a charsmap with texts that are not UTF-8; it is damaged") from error
    longest = max(map(len, texts.split(b"\0")))
    if longest > LONGEST_REWRITE:
        raise DocumentError(f"has a charsmap that makes {longest} bytes of one letter, at most {LONGEST_REWRITE}")


def check_tokenizer_folder(folder: Path) -> None:
    """Hold the files of a tokenizer's folder that reach a library against what a T5 has.

    Raises DocumentError, with the path and no advice.
    """
    if (folder / "tokenizer.json").is_file():
        read_tokenizer(folder / "tokenizer.json")
    if (folder / SPIECE).is_file():
        _check_spiece(folder / SPIECE)


def _check_spiece(path: Path) -> None:
    try:
        protobuf: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        return  # then transformers cannot read the file either
    try:
        model = protobuf.ModelProto.FromString(read_bytes(path, most=MOST_BYTES))
        charsmap = model.normalizer_spec.precompiled_charsmap
        if charsmap:
            check_charsmap(charsmap)
    except DocumentError as error:
        raise DocumentError(error.reason, path) from error
    except Exception as error:  # protobuf raises errors of its own
        raise DocumentError(f"cannot be read: {one_line(error)}", path) from error


def _check_replace(part: Replace) -> None:
    [(kind, pattern)] = part.pattern.items()
    if kind == "Regex" and pattern not in REWRITTEN:
        raise DocumentError(f"replaces the regular expression {pattern!r}, supported are {', '.join(REWRITTEN)}")
    shortest = REWRITTEN[pattern] if kind == "Regex" else len(pattern)
    if len(part.content) > shortest:
        raise DocumentError(f"replaces {shortest} letters by {len(part.content)}, so that a text grows")
