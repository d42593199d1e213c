"""Documents that carry a digest of themselves: sha256 over the canonical JSON of everything else in them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ilf_trt.errors import shown

from .document import DocumentError, canonical, parse_json

DIGEST = "digest"
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A digest in hex, as `hashlib` writes it."""


def stamped(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with its digest."""
    return {**data, DIGEST: _digest_of(data)}


def stamped_text(data: Mapping[str, Any]) -> str:
    """The text of a document with its digest, as it is read back; raises DocumentError for what JSON cannot hold."""
    try:
        return json.dumps(stamped(parse_json(json.dumps(data))), indent=2) + "\n"
    except DocumentError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise DocumentError(f"is no plain data: {error}") from error


def check_stamp(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a document without its digest; raises DocumentError if it has none, or that of another content."""
    wanted = _digest_of(data)
    if data.get(DIGEST) != wanted:
        raise DocumentError(
            f"was changed after it was written: its {DIGEST} is {shown(str(data.get(DIGEST)), 12)}, its content has "
            f"{wanted[:12]}"
        )
    return {name: value for name, value in data.items() if name != DIGEST}


def _digest_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({name: value for name, value in data.items() if name != DIGEST})).hexdigest()
