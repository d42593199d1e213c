"""Prompts as the token numbers of a T5, by the tokenizer that was saved beside its encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.spec import TextSpec
from ilf_trt.errors import BundleError, InvalidRequest, MissingDependency

END, PADDING = "</s>", "<pad>"


@dataclass(frozen=True, slots=True)
class Encoded:
    """B prompts as L tokens each: `ids` (B, L), int32; `mask` (B, L), float32, 1 = a token, 0 = padding.

    `cut` holds for every prompt what did not fit into L tokens, as the tokenizer reads it back; "" where all did.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.float32]
    cut: tuple[str, ...]


class Tokens:
    """A T5's tokenizer with a fixed length; `encode` changes nothing, so several threads may call it at once."""

    def __init__(self, path: Path, spec: TextSpec) -> None:
        """Open the tokenizer.json at `path`; its own truncation and padding give way to the length of `spec`.

        Raises MissingDependency without tokenizers, and BundleError for a file that is missing, damaged, not a T5's,
        or of more tokens than `spec` has.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency(f"prompts need {error.name}; pip install 'ilf-trt[text]'") from error
        try:
            # Read here: the library's own error for a file that is not there has neither a type nor a path.
            self._tokenizer: Any = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror or error}; build the bundle anew") from error
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"{path} is no tokenizer ({error}); build the bundle anew") from error
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

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """B prompts -> Encoded, each closed by </s> even where it is cut; prompts are taken as they are.

        Equal to transformers' T5 tokenizer with padding="max_length", truncation=True and max_length=L. Raises
        InvalidRequest for a prompt that is no text.
        """
        if isinstance(prompts, str):
            raise InvalidRequest(f"prompts is the text {prompts!r}; give a list of prompts")
        # One by one: a batch would start the library's pool of threads, which outlives the call.
        encodings = [self._encode(prompt) for prompt in prompts]
        shape = (len(encodings), self.length)
        return Encoded(
            np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape),
            np.array([encoding.attention_mask for encoding in encodings], np.float32).reshape(shape),
            tuple(self._cut(encoding) for encoding in encodings),
        )

    def _encode(self, prompt: str) -> Any:
        try:
            return self._tokenizer.encode(prompt)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest(f"prompt {prompt!r} is no text ({error}); give a str of Unicode characters") from error

    def _cut(self, encoding: Any) -> str:
        ids = [
            number
            for piece in encoding.overflowing
            for number, added in zip(piece.ids, piece.special_tokens_mask, strict=True)
            if not added
        ]
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _check_t5(path: Path, tokenizer: Any, spec: TextSpec) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    closing = tokenizer.encode("").tokens
    if closing != [END] or tokenizer.token_to_id(PADDING) is None:
        raise BundleError(
            f"{path} is not the tokenizer of a T5: it closes a text by {closing}, expected {[END]}, and "
            f"{'has' if tokenizer.token_to_id(PADDING) is not None else 'lacks'} {PADDING}; build the bundle anew"
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= spec.vocabulary:
        raise BundleError(
            f"{path} has tokens up to {highest}, the text encoder knows {spec.vocabulary}; build the bundle anew"
        )
