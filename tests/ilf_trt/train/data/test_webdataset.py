"""Webdataset shards, read at any place."""

from pathlib import Path

import pytest
import torch

from ilf_trt.errors import BrokenSample, DataError, InvalidRequest
from ilf_trt.train.data.picture import pixels_of
from ilf_trt.train.data.sample import Condition
from ilf_trt.train.data.webdataset import TarShards, shards_of
from tests.ilf_trt.train.data.conftest import encoded, write_tar


def write_labels(path: Path, count: int) -> Path:
    members = {}
    for number in range(count):
        members |= {f"{number:03}.png": encoded(number), f"{number:03}.cls": f"{number}\n".encode()}
    return write_tar(path, members)


def test_members_with_one_base_name_are_a_sample(tmp_path: Path) -> None:
    source = TarShards(str(write_labels(tmp_path / "a.tar", 3)), size=8)
    sample = source.read(2)
    assert (len(source), sample.key, sample.label) == (3, "a.tar:002", 2)
    assert torch.equal(sample.x0, pixels_of("", encoded(2), size=8, channels=3))


def test_captions_come_from_txt_or_json(tmp_path: Path) -> None:
    members = {
        "x/a.jpg": encoded(0, 8, "JPEG"),
        "x/a.txt": b" a cat \n",
        "b.png": encoded(1),
        "b.json": b'{"text": "b"}',
    }
    source = TarShards(str(write_tar(tmp_path / "a.tar", members)), size=8)
    assert source.condition is Condition.CAPTION
    assert [source.read(index).caption for index in range(2)] == ["a cat", "b"]
    assert source.key(0) == "a.tar:x/a"


def test_what_is_not_known_is_passed_over(tmp_path: Path) -> None:
    members = {"a.png": encoded(0), "a.cls": b"1", "a.npy": b"x", "a.seg.png": b"x", "README": b"x"}
    source = TarShards(str(write_tar(tmp_path / "a.tar", members)), size=8)
    assert (len(source), sorted(source.groups[0].members)) == (1, ["cls", "png"])


@pytest.mark.parametrize("name", ["a.pyd", "a.pickle", "a.pkl", "a.labels.pyd"])
def test_a_pickled_member_is_refused(name: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "evil.tar", {"a.png": encoded(0), "a.cls": b"1", name: b"x"})
    with pytest.raises(DataError, match=rf"evil\.tar holds {name}, a pickle, and unpickling can run any code"):
        TarShards(str(shard), size=8)


@pytest.mark.parametrize("size", [100, 512, 700, 1100, -1024])
def test_a_shard_that_is_cut_short_is_named(size: int, tmp_path: Path) -> None:
    shard = write_labels(tmp_path / "cut.tar", 3)
    written = shard.read_bytes()
    end = len(written.rstrip(b"\0")) // 512 * 512 + 512
    shard.write_bytes(written[: end if size < 0 else size])
    with pytest.raises(DataError, match=r"shard .*cut\.tar is damaged or cut short"):
        TarShards(str(shard), size=8)


def test_a_shard_with_a_damaged_header_is_named(tmp_path: Path) -> None:
    shard = write_labels(tmp_path / "bad.tar", 3)
    damaged = bytearray(shard.read_bytes())
    damaged[1024:1100] = b"x" * 76
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=r"bad\.tar is damaged"):
        TarShards(str(shard), size=8)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"b.cls": b"1"}, "has no picture"),
        ({"b.png": b"x", "b.cls": b"1"}, "not a picture"),
        ({"b.png": encoded(0)}, "has no label"),
        ({"b.png": encoded(0), "b.cls": b"one"}, "its label is 'one'"),
        ({"b.png": encoded(0), "b.cls": b"\xff"}, "not UTF-8"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.cls": b"1", **members})
    with pytest.raises(BrokenSample, match=rf"a\.tar:b: .*{reason}"):
        TarShards(str(shard), size=8).read(1)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "has no caption"),
        ({"b.json": b"{"}, "is not readable JSON"),
        ({"b.json": b"[]"}, "expected an object"),
        ({"b.json": b"{}"}, "no text under caption or text"),
    ],
)
def test_a_caption_that_cannot_be_read_is_named(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.txt": b"a", "b.png": encoded(1), **members})
    with pytest.raises(BrokenSample, match=rf"a\.tar:b: .*{reason}"):
        TarShards(str(shard), size=8).read(1)


def test_paths_name_a_file_a_folder_a_glob_or_braces(tmp_path: Path) -> None:
    shards = [write_labels(tmp_path / f"s-{number:03}.tar", 1) for number in (8, 9, 10)]
    assert shards_of(str(shards[0])) == shards[:1]
    for path in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{008..010}.tar", tmp_path / "s-0{08..10}.tar"):
        assert shards_of(str(path)) == shards


@pytest.mark.parametrize(
    ("path", "part"),
    [("none.tar", "none.tar is missing"), ("s-{0..1}.tar", "s-0.tar is missing"), ("*.tar", "holds no .tar")],
)
def test_a_path_without_shards_is_refused(path: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=part):
        shards_of(str(tmp_path / path))


def test_shards_without_labels_and_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a label"):
        TarShards(str(write_tar(tmp_path / "a.tar", {"a.png": encoded(0)})), size=8)
    with pytest.raises(InvalidRequest, match="holds no sample"):
        TarShards(str(write_tar(tmp_path / "b.tar", {"README": b"x"})), size=8)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.PNG": encoded(0), "a.cls": b"1"})
    with pytest.raises(DataError, match=r"holds a\.PNG twice"):
        TarShards(str(shard), size=8)
