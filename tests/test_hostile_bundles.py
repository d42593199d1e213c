"""Manifests with flipped bits, and manifests of an attacker whose digest fits: each is refused, or changes nothing."""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.bundle import MANIFEST_FILE, Bundle
from ilf_trt.contract.document import DocumentError, parse_json
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.stamp import stamped
from ilf_trt.errors import MESSAGE_CHARS, IlfError
from ilf_trt.runtime.memory import MemoryLimit
from ilf_trt.runtime.onnx_file import OnnxFile

MOST_S, MOST_KIB = 5.0, 300 * 1024
NASTY = st.sampled_from(
    [
        *(0, -1, -8, 1, 2, 3, 16, 1000, 10**4, 10**5, 10**6, 2**31, 2**63, 2**64 - 1),
        *(0.5, -0.0, 1e-300, 3e38, 1e39, 1e300, True, False, None),
        *("", "x", "\x1b]0;title\x07", "a\nb", "9" * 5000, "../../etc/passwd", "/dev/zero", "nan", "fp16", "fp8"),
        *([], {}, [[]], [1] * 1000, {"a": 1}, ["B", 1]),
    ]
)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value, and to every part."""
    yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))


@pytest.fixture
def text(dit_bundle: Path) -> bytes:
    return (dit_bundle / MANIFEST_FILE).read_bytes()


@pytest.mark.fuzz
@given(st.data())
def test_a_flipped_bit_in_a_manifest_is_refused_or_changes_nothing(text: bytes, data: st.DataObject) -> None:
    place, bit = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(text)
    flipped[place] ^= 1 << bit
    manifest, message = None, ""
    try:
        manifest = Manifest.from_json(parse_json(bytes(flipped).decode("utf-8", "surrogateescape")))
    except IlfError as error:
        message = str(error)
    assert len(message) <= MESSAGE_CHARS
    assert manifest in (None, Manifest.from_json(parse_json(text)))


@pytest.mark.fuzz
@given(st.data())
def test_a_manifest_of_an_attacker_is_refused_in_time_and_memory(dit_bundle: Path, data: st.DataObject) -> None:
    content = json.loads((dit_bundle / MANIFEST_FILE).read_text())
    paths = sorted(leaves(content), key=str)
    for _ in range(data.draw(st.integers(1, 3))):
        target, path = content, data.draw(st.sampled_from([path for path in paths if path]))
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = data.draw(NASTY)
        except (KeyError, IndexError, TypeError):
            continue
    message = ""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        manifest = Manifest.from_json(parse_json(json.dumps(stamped(json.loads(json.dumps(content))))))
        bundle = Bundle(dit_bundle, manifest)
        MemoryLimit(manifest, 1 << 30, on_gpu=False).check_smallest()
        for graph in manifest.graphs:
            OnnxFile.of_bundle(bundle, graph)
    except IlfError as error:
        message = str(error)
    assert len(message) <= MESSAGE_CHARS
    assert message.isprintable()
    assert time.monotonic() - begin < MOST_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


@pytest.mark.parametrize("twice", ['"schema": 5, "schema": 5', '"plan": {}, "plan": {}'])
def test_a_key_that_is_given_twice_is_refused(twice: str) -> None:
    with pytest.raises(DocumentError, match="twice"):
        parse_json("{" + twice + "}")
