"""Prompts as the model sees them: cleaned, cut into tokens, embedded by graph `text`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.contract.conditioning import negative
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import PICTURES, TEXT, Role
from ilf_trt.contract.spec import TextSpec
from ilf_trt.errors import InvalidRequest, NonFinite, shown
from ilf_trt.runtime.arguments import listed, text_of
from ilf_trt.runtime.batches import run_batches
from ilf_trt.runtime.finite import remedy
from ilf_trt.runtime.session import Session

from .caption import EXCERPT_CHARS, prepare_caption
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

LONGEST_PROMPT = 10_000  # characters; the rest is not read. 300 tokens are about 1,500
LOGGED_CHARS = 100

Prompt = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the pictures of a request shall show, and what not, B of each; `clean` removes links, tags and the like.

    `rest` is what was left out of each positive text before anything read it, because the text was too long.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    rest: tuple[str, ...]
    clean: bool

    @classmethod
    def of(cls, prompt: Prompt, negative: Prompt | None, *, clean: bool) -> "Prompts":
        """A string is one picture; one negative prompt is for all.

        Of each text the first LONGEST_PROMPT characters count. Raises InvalidRequest.
        """
        positive = _texts("prompt", prompt)
        against = _texts("negative_prompt", "" if negative is None else negative)
        if len(against) == 1:
            against *= len(positive)
        if len(against) != len(positive):
            raise InvalidRequest(
                f"{len(against)} negative prompts for {len(positive)} prompts; give one, or one for each"
            )
        return cls(
            _heads("prompt", positive),
            _heads("negative_prompt", against),
            tuple(text[LONGEST_PROMPT : 2 * LONGEST_PROMPT] for text in positive),
            clean,
        )

    def prepare(self, text: str) -> str:
        """A text as the model reads it."""
        return prepare_caption(text, clean=self.clean)


@dataclass(frozen=True, slots=True)
class EmbeddedText:
    """Conditions by port (text and mask, and the negative ones), and what was cut off of each prompt.

    `cut` holds the first LONGEST_PROMPT characters of what was cut off.
    """

    conditions: dict[str, NDArray[np.float32]]
    cut: tuple[str, ...]


def embed(
    prompts: Prompts, tokenizer: Tokenizer, spec: TextSpec, manifest: Manifest, session: Session, *, guided: bool
) -> EmbeddedText:
    """Embed every different text once; the negative ones only if `guided`. Raises NonFinite."""
    positive = tuple(map(prompts.prepare, prompts.positive))
    against = tuple(map(prompts.prepare, prompts.negative)) if guided else ()
    texts = tuple(dict.fromkeys((*positive, *against)))
    encoding = tokenizer.encode(texts)
    embeddings = np.empty((len(texts), spec.tokens, spec.channels), np.float32)
    for chunk in run_batches(len(texts), manifest.batch):
        call = session.call(spec.graph, {PICTURES: chunk.rows})
        call.inputs["ids"][:] = chunk.take(encoding.ids)
        call.inputs["ids_mask"][:] = chunk.take(encoding.mask)
        call()
        embeddings[chunk.begin : chunk.end] = call.outputs["text"][: chunk.pictures]
    if not is_finite(embeddings):
        text = next(text for text, row in zip(texts, embeddings, strict=True) if not is_finite(row))
        raise NonFinite(
            f"graph {TEXT} gave NaN or infinity for the prompt {shown(text, EXCERPT_CHARS)!r}; "
            f"{remedy(TEXT, spec.precision)}"
        )
    row_of = {text: row for row, text in enumerate(texts)}
    ports = manifest.spec.conditioning.positive

    def conditions(of: tuple[str, ...]) -> dict[str, Any]:
        rows = [row_of[text] for text in of]
        values = {Role.TEXT: embeddings[rows], Role.MASK: encoding.mask[rows]}
        return {port.name: values[port.role] for port in ports if port.role in values}

    own = conditions(positive) | (negative(conditions(against)) if guided else {})
    overflow = tuple(encoding.overflow[row_of[text]] for text in positive)
    return EmbeddedText(own, _report(overflow, prompts.rest, spec))


def _report(overflow: tuple[str, ...], rest: tuple[str, ...], spec: TextSpec) -> tuple[str, ...]:
    cut = tuple(f"{end}{left_out}"[:LONGEST_PROMPT] for end, left_out in zip(overflow, rest, strict=True))
    for text in dict.fromkeys(filter(None, cut)):
        log.warning(
            "the prompt is longer than the model's %d tokens, or than %d characters; the model does not see: %r",
            spec.tokens,
            LONGEST_PROMPT,
            shown(text, LOGGED_CHARS),
        )
    return cut


def _texts(name: str, value: Prompt) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    expected = "a text, or a list of texts"
    texts = tuple(text_of(name, text, expected) for text in listed(name, value, expected))
    if not texts:
        raise InvalidRequest(f"{name} is an empty list; give at least one text")
    return texts


def _heads(name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    """What is read of each text; raises InvalidRequest if that, or the rest that is told, is no Unicode."""
    for text in texts:
        try:
            text[: 2 * LONGEST_PROMPT].encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{name} holds {text[error.start]!a} at place {error.start}, half of a character; give whole ones"
            ) from error
    return tuple(text[:LONGEST_PROMPT] for text in texts)
