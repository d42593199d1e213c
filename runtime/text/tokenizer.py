"""Turns prompts into the token numbers of a T5, with the tokenizer file of its encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.document import MOST_BYTES, DocumentError
from ilf_trt.contract.spec import TextSpec
from ilf_trt.contract.tokenizer_file import check_tokenizer
from ilf_trt.errors import BundleError, IlfError, InvalidRequest, MissingDependency, one_line, shown
from ilf_trt.files import read_bytes

END, PADDING = "</s>", "<pad>"
PANIC = "PanicException"  # of a library in Rust; the class cannot be imported
EXCERPT_CHARS, REASON_CHARS = 60, 150


@dataclass(frozen=True, slots=True)
class Encoding:
    """B prompts as L tokens each: `ids` (B, L), int32; `mask` (B, L), float32, 1 = a token, 0 = padding.

    `overflow` holds, for every prompt, the decoded text of the tokens past L; "" if the whole prompt fits.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.float32]
    overflow: tuple[str, ...]


class Tokenizer:
    """A T5's tokenizer with a fixed length L. `encode` changes no state, so several threads may call it at once."""

    def __init__(self, path: Path, spec: TextSpec, content: bytes | None = None) -> None:
        """Open the tokenizer.json at `path`, or its `content` if that was read before.

        The length of `spec` replaces the file's truncation and padding. Raises MissingDependency without the package
        tokenizers. Raises BundleError if the file is missing, damaged, not a T5's, or has more tokens than `spec`.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependency(f"prompts need {error.name}; pip install 'ilf-trt[text]'") from error
        try:
            # Python reads the file: the library's error for a missing file has neither a type nor a path.
            if content is None:
                content = read_bytes(path, most=MOST_BYTES)
            check_tokenizer(content)
        except DocumentError as error:
            raise BundleError(f"{path} is no tokenizer of a T5 ({error.reason}); build the bundle again") from error
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {path}: {one_line(error)}; build the bundle again") from error
        with _library(BundleError, f"{path} is no tokenizer", "build the bundle again"):
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            _check_t5(path, self._tokenizer, spec)
            self._tokenizer.enable_truncation(spec.tokens, stride=0, strategy="longest_first", direction="right")
            self._tokenizer.enable_padding(
                length=spec.tokens,
                direction="right",
                pad_id=self._tokenizer.token_to_id(PADDING),
                pad_token=PADDING,
                pad_type_id=0,
                pad_to_multiple_of=None,
            )
        self.length = spec.tokens

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """B prompts -> Encoding. Every row ends with </s>, also a truncated one; the prompts are not cleaned.

        The result equals transformers' T5 tokenizer with padding="max_length", truncation=True and max_length=L.
        Raises InvalidRequest for a prompt that is no text.
        """
        if isinstance(prompts, str):
            raise InvalidRequest(f"prompts is the text {shown(prompts, EXCERPT_CHARS)!r}; give a list of prompts")
        # One prompt at a time: a batch would start the library's thread pool, which outlives the call.
        encodings = [self._encode(prompt) for prompt in prompts]
        shape = (len(encodings), self.length)
        return Encoding(
            np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape),
            np.array([encoding.attention_mask for encoding in encodings], np.float32).reshape(shape),
            tuple(self._overflow(encoding) for encoding in encodings),
        )

    def _encode(self, prompt: str) -> Any:
        excerpt = repr(prompt[:EXCERPT_CHARS]) if isinstance(prompt, str) else f"of type {type(prompt).__name__}"
        with _library(InvalidRequest, f"prompt {excerpt} is no text", "give a str of Unicode characters"):
            return self._tokenizer.encode(prompt)

    def _overflow(self, encoding: Any) -> str:
        ids = [
            number
            for piece in encoding.overflowing
            for number, added in zip(piece.ids, piece.special_tokens_mask, strict=True)
            if not added
        ]
        with _library(InvalidRequest, "the end of a prompt that is too long is no text", "shorten the prompt"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
            return text


@contextmanager
def _library(kind: type[IlfError], what: str, advice: str) -> Iterator[None]:
    """Translate what the tokenizers library raises; a panic of it has printed itself to stderr by then."""
    try:
        yield
    except IlfError:
        raise
    except BaseException as error:  # the library raises bare Exceptions, and a panic is not even one
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise kind(f"{what} ({one_line(error, REASON_CHARS)}); {advice}") from error


def _check_t5(path: Path, tokenizer: Any, spec: TextSpec) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ending = tokenizer.encode("")
    if ending.tokens != [END] or ending.ids != [tokenizer.token_to_id(END)] or tokenizer.token_to_id(PADDING) is None:
        raise BundleError(
            f"{path} is not the tokenizer of a T5: it ends a text with {ending.tokens} of number {ending.ids}, "
            f"expected {[END]} of number {tokenizer.token_to_id(END)}, and "
            f"{'has' if tokenizer.token_to_id(PADDING) is not None else 'lacks'} {PADDING}; build the bundle again"
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= spec.vocabulary:
        raise BundleError(
            f"{path} has tokens up to {highest}, the text encoder has {spec.vocabulary}; build the bundle again"
        )
