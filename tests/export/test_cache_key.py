"""What a cached graph depends on: the source that decides its bytes, and nothing that people only read or type."""

import importlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import ilf_trt.contract
import ilf_trt.model
from ilf_trt import ILFModel, attach
from ilf_trt.contract.manifest import AttentionAmax
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.export import cache_key
from ilf_trt.export.cache_key import graph_key, source_digest
from ilf_trt.export.segments import Segment, segments_of, spec_of
from ilf_trt.model.backbones.dit import DiT
from tests.conftest import LOOP, small_dit

ROOT = Path(__file__).parents[2]
WINGS = ("ilf_trt", "export", "engines", "runtime")
OF_GRAPHS = ("ilf_trt/contract/", "ilf_trt/model/", "export/")
SOURCES = [
    str(path.relative_to(ROOT))
    for wing in WINGS
    for path in sorted((ROOT / wing).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]

BATCH = BatchRange(1, 4, 16)

Keys = Callable[[], dict[str, str]]


@pytest.fixture
def product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the product's source, from which graphs get their keys."""
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.setattr(ilf_trt.contract, "__path__", [str(tmp_path / "ilf_trt/contract")])
    monkeypatch.setattr(ilf_trt.model, "__path__", [str(tmp_path / "ilf_trt/model")])
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "export/cache_key.py"))
    return tmp_path


@pytest.fixture(scope="module")
def keys() -> Keys:
    """Reads the source again, and returns the key of every graph of a model."""
    segments = _segments_of(attach(small_dit(), LOOP))

    def read() -> dict[str, str]:
        source_digest.cache_clear()
        return {name: graph_key(each, Precision.FP32, BATCH, None) for name, each in segments.items()}

    return read


def test_a_change_of_a_block_is_a_new_key_for_every_graph(product: Path, keys: Keys) -> None:
    before = keys()
    block = product / "ilf_trt/model/block.py"
    block.write_text(block.read_text().replace("* ", "* 2 * ", 1))
    after = keys()
    assert after.keys() == before.keys()
    assert not set(before.values()) & set(after.values())


def test_a_change_of_a_help_text_or_a_command_keeps_every_key(product: Path, keys: Keys) -> None:
    before = keys()
    for name in SOURCES:
        if not name.startswith(OF_GRAPHS):
            path = product / name
            path.write_text(path.read_text().replace("help=", "help='again: ' + ") + "\nCHANGED = True\n")
    assert keys() == before


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith(OF_GRAPHS)])
def test_a_change_of_a_file_that_graphs_come_from_is_a_new_key(name: str, product: Path) -> None:
    source_digest.cache_clear()
    before = source_digest()
    with (product / name).open("a") as file:
        file.write("\nCHANGED = True\n")
    source_digest.cache_clear()
    assert source_digest() != before


def test_a_change_of_a_class_that_an_adapter_of_others_inherits_from_is_a_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "foreign_base.py"
    base.write_text("from ilf_trt.model.backbones.dit import DiT\n\nclass Base(DiT):\n    pass\n")
    (tmp_path / "foreign.py").write_text("from foreign_base import Base\n\nclass Mine(Base):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    segment = _segment_of(importlib.import_module("foreign").Mine)
    before = graph_key(segment, Precision.FP32, BATCH, None)
    base.write_text(base.read_text() + "# changed\n")
    cache_key._source_of.cache_clear()
    assert graph_key(segment, Precision.FP32, BATCH, None) != before


def test_a_class_without_a_file_is_never_taken_from_the_cache() -> None:
    segment = _segment_of(type("Mine", (DiT,), {"__module__": "nowhere"}))
    before = graph_key(segment, Precision.FP32, BATCH, None)
    cache_key._source_of.cache_clear()
    assert graph_key(segment, Precision.FP32, BATCH, None) != before


def test_attentions_in_fp8_their_ranges_and_their_padding_are_in_the_key() -> None:
    segment = _segment_of(DiT)
    key = partial(graph_key, segment, Precision.FP8, BATCH, {})
    attentions = {"transformer_blocks.1.attn1": AttentionAmax(1.0, 2.0, 3.0)}
    wider = {"transformer_blocks.1.attn1": AttentionAmax(1.0, 2.0, 4.0)}
    keys = [key({}), key(attentions), key(wider), key(attentions, pad=True)]
    assert len(set(keys)) == len(keys)
    assert key(dict(attentions)) == keys[1]


def _segment_of(adapter: type[DiT]) -> Segment:
    model = attach(small_dit(), LOOP)
    model.adapter.__class__ = adapter
    return _segments_of(model)["pre"]


def _segments_of(model: ILFModel) -> dict[str, Segment]:
    spec = spec_of(model, guidance=True, text_tokens=1, train_timesteps=1000, precision=Precision.FP32)
    return segments_of(model, spec, Precision.FP32)


@pytest.fixture(autouse=True)
def _no_digest_of_a_copy_stays() -> Iterator[None]:
    yield
    source_digest.cache_clear()
