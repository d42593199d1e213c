"""A recipe's data table: what is refused, and what it opens."""

from pathlib import Path
from typing import Any

import pytest

from ilf_trt.errors import DataError, InvalidRequest
from ilf_trt.train.batch_stream import MemoryStream
from ilf_trt.train.data import fit_stream, open_stream
from ilf_trt.train.data.images import ImageFolder
from ilf_trt.train.data.latents import LatentShards
from ilf_trt.train.data.loader import Loader
from ilf_trt.train.data.prepare import prepare
from ilf_trt.train.data.table import table_of
from ilf_trt.train.data.webdataset import TarShards
from ilf_trt.train.recipe import read_table, recipe_names
from tests.ilf_trt.train.data.conftest import Halves, encoded, preparation, write_captions, write_classes, write_tar

IMAGES = {"kind": "images", "path": "somewhere", "size": 8}


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({}, "data.kind is missing"),
        ({"kind": "image"}, "must be one of digits, images, webdataset, latents; did you mean images"),
        ({"kind": 3}, "data.kind is 3"),
        ({"kind": "images", "size": 8}, "data.path is missing"),
        ({"kind": "webdataset", "path": "a"}, "data.size is missing"),
        (IMAGES | {"max_brokn": 3}, "data.max_brokn is unknown; did you mean max_broken"),
        (IMAGES | {"path": 3}, "data.path is 3, it must be text"),
        (IMAGES | {"size": "8"}, "data.size is '8', it must be a whole number"),
        (IMAGES | {"flip": 1}, "data.flip is 1, it must be true or false"),
        (IMAGES | {"size": 0}, "data.size is 0, it must be at least 1"),
        (IMAGES | {"channels": 2}, "data.channels is 2, it must be 1 or 3"),
        (IMAGES | {"workers": -1}, "data.workers is -1"),
        (IMAGES | {"max_broken": -1}, "data.max_broken is -1"),
        ({"kind": "digits", "path": "a"}, "data.path is unknown"),
        ({"kind": "latents", "path": "a", "size": 8}, "data.size is unknown"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        table_of(table)
    assert part in str(refused.value)


def test_the_section_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"validation\.path is missing"):
        open_stream({"kind": "latents"}, global_batch=1, seed=0, section="validation")
    with pytest.raises(InvalidRequest, match="validation: nowhere is not a folder"):
        open_stream({"kind": "latents", "path": "nowhere"}, global_batch=1, seed=0, section="validation")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_has_a_table_that_fits(name: str) -> None:
    table = read_table(name)["data"]
    if table["kind"] != "digits":
        table = {"path": "somewhere"} | table
    table_of(table)


def test_each_kind_opens_its_source(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "images", {"cat": 3})
    shard = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.cls": b"0"})
    prepare(ImageFolder(images, size=8), tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    for table, kind in (
        ({"kind": "images", "path": str(images), "size": 8, "flip": True}, ImageFolder),
        ({"kind": "webdataset", "path": str(shard), "size": 8}, TarShards),
        ({"kind": "latents", "path": str(tmp_path / "out"), "verify": True, "workers": 0}, LatentShards),
    ):
        stream = open_stream(table, global_batch=2, seed=0)
        assert isinstance(stream, Loader)
        assert isinstance(stream.source, kind)


def test_digits_come_from_memory_and_need_no_fitting() -> None:
    stream = open_stream({"kind": "digits"}, global_batch=4, seed=0)
    assert isinstance(stream, MemoryStream)
    adapter: Any = None
    assert fit_stream(stream, adapter) is stream


def test_raw_captions_say_to_prepare(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", 2)
    with pytest.raises(InvalidRequest, match=r"data: the data has captions as text.*run `ilf-trt prepare"):
        open_stream({"kind": "images", "path": str(tmp_path / "captions"), "size": 8}, global_batch=1, seed=0)


def test_damaged_data_names_the_section(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data: .*is not prepared data"):
        open_stream({"kind": "latents", "path": str(tmp_path)}, global_batch=1, seed=0)
