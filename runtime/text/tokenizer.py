"""Turns prompts into the token numbers of a T5, with the tokenizer file of its encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.spec import TextSpec
from ilf_trt.errors import BundleError, InvalidRequest, MissingDependency, one_line

END, PADDING = "</s>", "<pad>"


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

    def __init__(self, path: Path, spec: TextSpec) -> None:
        """Open the tokenizer.json at `path`; the length of `spec` replaces the file's truncation and padding.

        Raises MissingDependency without the package tokenizers. Raises BundleError if the file is missing, damaged, not
        a T5's, or has more tokens than `spec`.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependency(f"prompts need {error.name}; pip install 'ilf-trt[text]'") from error
        try:
            # Python reads the file: the library's error for a missing file has neither a type nor a path.
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"cannot read {path}: {one_line(error)}; build the bundle anew") from error
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"{path} is no tokenizer ({one_line(error)}); build the bundle anew") from error
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
            raise InvalidRequest(f"prompts is the text {prompts!r}; give a list of prompts")
        # One prompt at a time: a batch would start the library's thread pool, which outlives the call.
        encodings = [self._encode(prompt) for prompt in prompts]
        shape = (len(encodings), self.length)
        return Encoding(
            np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape),
            np.array([encoding.attention_mask for encoding in encodings], np.float32).reshape(shape),
            tuple(self._overflow(encoding) for encoding in encodings),
        )

    def _encode(self, prompt: str) -> Any:
        try:
            return self._tokenizer.encode(prompt)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest(
                f"prompt {prompt!r} is no text ({one_line(error)}); give a str of Unicode characters"
            ) from error

    def _overflow(self, encoding: Any) -> str:
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
    ending = tokenizer.encode("").tokens
    if ending != [END] or tokenizer.token_to_id(PADDING) is None:
        raise BundleError(
            f"{path} is not the tokenizer of a T5: it ends a text with {ending}, expected {[END]}, and "
            f"{'has' if tokenizer.token_to_id(PADDING) is not None else 'lacks'} {PADDING}; build the bundle anew"
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= spec.vocabulary:
        raise BundleError(
            f"{path} has tokens up to {highest}, the text encoder has {spec.vocabulary}; build the bundle anew"
        )
