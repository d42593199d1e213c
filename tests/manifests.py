"""Changes of a bundle's manifest that fit its digest, as an attacker can make them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.contract.stamp import stamped


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the plain data of a manifest, and give it the digest that fits."""
    place = bundle / MANIFEST_FILE
    data = json.loads(place.read_text())
    change(data)
    place.write_text(json.dumps(stamped(data)))
