"""Prompts as the model sees them: cleaned, cut into tokens, embedded by graph `text`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.ports import NEGATIVE, PICTURES
from ilf_trt.contract.spec import Batch, TextSpec
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.batches import run_batches
from ilf_trt.runtime.session import Session
from ilf_trt.runtime.text.caption import prepare_caption
from ilf_trt.runtime.text.tokenizer import Encoding, Tokenizer

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

    def read(self, text: str) -> str:
        """A text as the model reads it."""
        return prepare_caption(text, clean=self.clean)


@dataclass(frozen=True, slots=True)
class Embedded:
    """Conditions (text, text_mask, and the same of the negative prompts), and what was cut off of each prompt."""

    conditions: dict[str, NDArray[np.float32]]
    cut: tuple[str, ...]


def embed(
    prompts: Prompts, tokens: Tokenizer, spec: TextSpec, batch: Batch, session: Session, *, guided: bool
) -> Embedded:
    """Embed every different text once; the negative ones only where `guided`."""
    read = tuple(map(prompts.read, prompts.positive))
    against = tuple(map(prompts.read, prompts.negative)) if guided else ()
    texts = tuple(dict.fromkeys((*read, *against)))
    encoded = tokens.encode(texts)
    embeddings = np.empty((len(texts), spec.tokens, spec.channels), np.float32)
    for chunk in run_batches(len(texts), batch):
        call = session.call(spec.graph, {PICTURES: chunk.rows})
        call.inputs["ids"][:] = chunk.take(encoded.ids)
        call.inputs["ids_mask"][:] = chunk.take(encoded.mask)
        call()
        embeddings[chunk.begin : chunk.end] = call.outputs["text"][: chunk.pictures]
    place = {text: index for index, text in enumerate(texts)}
    conditions: dict[str, Any] = {}
    for prefix, asked in (("", read), (NEGATIVE, against)):
        if asked:
            rows = [place[text] for text in asked]
            conditions[f"{prefix}text"] = embeddings[rows]
            conditions[f"{prefix}text_mask"] = encoded.mask[rows]
    cut = _report(encoded, [place[text] for text in read], spec)
    return Embedded(conditions, cut)


def _report(encoded: Encoding, rows: list[int], spec: TextSpec) -> tuple[str, ...]:
    cut = tuple(encoded.overflow[row] for row in rows)
    for text in dict.fromkeys(filter(None, cut)):
        log.warning("the prompt is longer than the model's %d tokens; not seen: %r", spec.tokens, text)
    return cut


def _texts(name: str, given: Prompt) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not texts:
        raise InvalidRequest(f"{name} is an empty list; give at least one text")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidRequest(f"{name} holds {text!r} of type {type(text).__name__}, expected text")
    return texts
