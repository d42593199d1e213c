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
from ilf_trt.runtime.batches import run_batches
from ilf_trt.runtime.finite import remedy
from ilf_trt.runtime.session import Session

from .caption import EXCERPT_CHARS, prepare_caption
from .tokenizer import Encoding, Tokenizer

log = logging.getLogger(__name__)

Prompt = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the pictures of a request shall show, and what not, B of each; `clean` removes links, tags and the like."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    clean: bool

    @classmethod
    def of(cls, prompt: Prompt, negative: Prompt | None, *, clean: bool) -> "Prompts":
        """A string is one picture; one negative prompt is for all. Raises InvalidRequest."""
        positive = _texts("prompt", prompt)
        against = _texts("negative_prompt", "" if negative is None else negative)
        if len(against) == 1:
            against *= len(positive)
        if len(against) != len(positive):
            raise InvalidRequest(
                f"{len(against)} negative prompts for {len(positive)} prompts; give one, or one for each"
            )
        return cls(positive, against, clean)

    def prepare(self, text: str) -> str:
        """A text as the model reads it."""
        return prepare_caption(text, clean=self.clean)


@dataclass(frozen=True, slots=True)
class EmbeddedText:
    """Conditions by port (text and mask, and the negative ones), and what was cut off of each prompt."""

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
    return EmbeddedText(own, _report(encoding, [row_of[text] for text in positive], spec))


def _report(encoding: Encoding, rows: list[int], spec: TextSpec) -> tuple[str, ...]:
    cut = tuple(encoding.overflow[row] for row in rows)
    for text in dict.fromkeys(filter(None, cut)):
        log.warning("the prompt is longer than the model's %d tokens; the model does not see: %r", spec.tokens, text)
    return cut


def _texts(name: str, value: Prompt) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts:
        raise InvalidRequest(f"{name} is an empty list; give at least one text")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidRequest(f"{name} holds {text!r} of type {type(text).__name__}, expected text")
    return texts
