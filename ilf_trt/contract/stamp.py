"""Documents that carry their own digest: sha256 over the canonical JSON of everything else in them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from .document import DocumentError, canonical, parse_json

STAMP = "sha256"
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A digest in hex, as `hashlib` writes it."""


def stamped_text(data: Mapping[str, Any]) -> str:
    """The text of a document with its digest, as it is read back; raises DocumentError for what JSON cannot hold."""
    try:
        content = parse_json(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, DocumentError) else DocumentError(f"is no plain data: {error}") from error
    return json.dumps({**content, STAMP: digest_of(content)}, indent=2) + "\n"


def check_stamp(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a document without its digest; raises DocumentError if it has none, or that of another content."""
    content = {name: value for name, value in data.items() if name != STAMP}
    sha256 = digest_of(content)
    if data.get(STAMP) != sha256:
        raise DocumentError(f"has another content than it was written with: its {STAMP} is not {sha256[:12]}…")
    return content


def digest_of(data: Mapping[str, Any]) -> str:
    """sha256 of plain data, in hex."""
    return hashlib.sha256(canonical(data)).hexdigest()
