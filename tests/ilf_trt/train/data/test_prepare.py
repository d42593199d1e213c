"""Preparing data, and reading what was prepared."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ilf_trt.contract.ports import Role
from ilf_trt.errors import CheckpointError, DataError, InvalidRequest
from ilf_trt.train.data.images import ImageFolder
from ilf_trt.train.data.index import Index, write_shard
from ilf_trt.train.data.latents import LatentShards
from ilf_trt.train.data.prepare import prepare
from ilf_trt.train.data.sample import Condition
from ilf_trt.train.data.vae import Vae
from tests.conftest import TEXT_CHANNELS, TEXT_TOKENS
from tests.ilf_trt.train.data.conftest import Halves, Words, preparation, write_captions, write_classes


@pytest.fixture
def labels(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_classes(tmp_path / "images", {"cat": 6, "dog": 4}), size=8)


@pytest.fixture
def captions(tmp_path: Path) -> ImageFolder:
    return ImageFolder(write_captions(tmp_path / "captions", 10), size=8)


def test_labels_come_back_with_latents_keys_and_sizes(labels: ImageFolder, tmp_path: Path) -> None:
    index = prepare(labels, tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    source = LatentShards(tmp_path / "out", verify=True)
    assert (len(source), source.condition, source.classes, source.shape) == (10, Condition.LABEL, 2, (4, 4, 4))
    assert [shard.rows for shard in index.shards] == [4, 4, 2]
    assert source.null is None
    for number in range(10):
        got, want = source.read(number), labels.read(number)
        assert (got.key, got.label, got.size) == (want.key, want.label, (8, 8))
        assert source.key(number) == want.key
        torch.testing.assert_close(got.x0, Halves().encode(want.x0[None], [number])[0])


def test_captions_come_back_embedded_with_the_null_captions(captions: ImageFolder, tmp_path: Path) -> None:
    words = Words()
    prepare(captions, tmp_path / "out", preparation(dtype="fp16"), pictures=Halves(), texts=words)
    source = LatentShards(tmp_path / "out")
    sample = source.read(9)
    assert sample.text is not None
    assert sample.text_mask is not None
    assert (sample.x0.dtype, sample.text.dtype, sample.text.shape) == (
        torch.float32,
        torch.float16,
        (TEXT_TOKENS, TEXT_CHANNELS),
    )
    assert sample.text[0, 0] == len("Picture number 9")
    assert sample.text_mask.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert source.null is not None
    assert source.null[Role.TEXT].shape == (1, TEXT_TOKENS, TEXT_CHANNELS)
    assert source.null[Role.MASK].tolist() == [[1.0, 0, 0, 0, 0, 0, 0]]
    assert words.captions[0] == ""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_batch_does_not_change_what_is_written(labels: ImageFolder, tmp_path: Path) -> None:
    for batch in (1, 4):
        prepare(labels, tmp_path / str(batch), preparation(batch=batch), pictures=Halves(), texts=None)
    assert files(tmp_path / "1") == files(tmp_path / "4")


class Stopping(Halves):
    """Ends the run before the sample `at`, and counts what it encodes."""

    def __init__(self, at: int) -> None:
        self.at, self.rows = at, list[int]()

    def encode(self, pixels: Any, indices: Any) -> Any:
        if self.at in indices:
            raise KeyboardInterrupt
        self.rows += indices
        return super().encode(pixels, indices)


def test_a_stopped_run_goes_on_and_gives_the_same_files(labels: ImageFolder, tmp_path: Path) -> None:
    prepare(labels, tmp_path / "whole", preparation(), pictures=Halves(), texts=None)
    with pytest.raises(KeyboardInterrupt):
        prepare(labels, tmp_path / "out", preparation(), pictures=Stopping(6), texts=None)
    assert sorted(files(tmp_path / "out")) == ["index.json", "shard-00000.safetensors"]
    with pytest.raises(DataError, match="is not complete: it has 1 shards so far"):
        LatentShards(tmp_path / "out")
    later = Stopping(-1)
    prepare(labels, tmp_path / "out", preparation(), pictures=later, texts=None)
    assert later.rows == [4, 5, 6, 7, 8, 9]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_shard_that_was_damaged_is_made_again(labels: ImageFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(labels, out, preparation(), pictures=Halves(), texts=None)
    before, damaged = files(out), out / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    prepare(labels, out, preparation(), pictures=Halves(), texts=None)
    assert files(out) == before


def test_other_settings_are_refused_with_both_values(labels: ImageFolder, tmp_path: Path) -> None:
    prepare(labels, tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    with pytest.raises(InvalidRequest, match="with other settings: size was 8 and is 16; give another --output"):
        prepare(labels, tmp_path / "out", preparation(settings={"size": 16}), pictures=Halves(), texts=None)
    (tmp_path / "images" / "cat" / "0.png").rename(tmp_path / "images" / "cat" / "9.png")
    moved = ImageFolder(tmp_path / "images", size=8)
    with pytest.raises(InvalidRequest, match="keys_sha256 was"):
        prepare(moved, tmp_path / "out", preparation(), pictures=Halves(), texts=None)


def test_a_folder_with_other_files_is_left_alone(labels: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds other files"):
        prepare(labels, tmp_path / "images", preparation(), pictures=Halves(), texts=None)


def test_two_runs_do_not_write_into_one_folder(labels: ImageFolder, tmp_path: Path) -> None:
    handle = os.open(tmp_path / "images", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InvalidRequest, match="another process prepares"):
            prepare(labels, tmp_path / "images", preparation(), pictures=Halves(), texts=None)
    finally:
        os.close(handle)


def test_a_shard_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*shard-00000\.safetensors: .*run the same command again"):
        write_shard(tmp_path / "shard-00000.safetensors", {"x0": torch.zeros(1)}, keys=["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_shards_may_be_read_by_whom_the_index_may(out: Path) -> None:
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_broken_pictures_are_left_out_and_listed(labels: ImageFolder, tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/3.png"):
        (tmp_path / "images" / name).write_bytes(b"x")
    index = prepare(labels, tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    assert index.broken == dict.fromkeys(["cat/1.png", "dog/3.png"], "not a picture that Pillow knows")
    source = LatentShards(tmp_path / "out")
    assert [source.key(number) for number in range(len(source))] == [
        name for name in labels.names if name not in index.broken
    ]


def test_too_many_broken_pictures_stop_it_also_over_two_runs(labels: ImageFolder, tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/3.png"):
        (tmp_path / "images" / name).write_bytes(b"x")
    how = preparation(max_broken=1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 samples are broken, max_broken is 1.*dog/3\.png"):
            prepare(labels, tmp_path / "out", how, pictures=Halves(), texts=None)


def test_a_latent_beyond_the_dtype_is_a_broken_sample(labels: ImageFolder, tmp_path: Path) -> None:
    class Huge(Halves):
        def encode(self, pixels: Any, indices: Any) -> Any:
            return (
                super().encode(pixels, indices) + torch.tensor([1e6 * (i == 2) for i in indices])[:, None, None, None]
            )

    index = prepare(labels, tmp_path / "out", preparation(dtype="fp16"), pictures=Huge(), texts=None)
    assert index.broken == {"cat/2.png": "its x0 is not finite in fp16; try --dtype bf16"}


def test_a_whole_shard_of_broken_pictures_is_passed_over(labels: ImageFolder, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "images" / "cat" / f"{number}.png").write_bytes(b"x")
    prepare(labels, tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    assert LatentShards(tmp_path / "out", verify=True).read(0).key == "cat/4.png"


def test_encoders_that_do_not_match_the_data_are_refused(
    labels: ImageFolder, captions: ImageFolder, tmp_path: Path
) -> None:
    for source, pictures, texts, part in (
        (captions, Halves(), None, "--text-encoder"),
        (labels, Halves(), Words(), "leave out --text-encoder"),
        (labels, None, None, "--vae"),
    ):
        with pytest.raises(InvalidRequest, match=part):
            prepare(source, tmp_path / "out", preparation(), pictures=pictures, texts=texts)


def test_progress_counts_to_the_end(labels: ImageFolder, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    prepare(
        labels,
        tmp_path / "out",
        preparation(),
        pictures=Halves(),
        texts=None,
        progress=lambda what, done, total, *_: steps.append((done, total)),
    )
    assert (steps[0], steps[-1]) == ((0, 10), (10, 10))
    assert steps == sorted(steps)


@pytest.fixture
def out(labels: ImageFolder, tmp_path: Path) -> Path:
    prepare(labels, tmp_path / "out", preparation(), pictures=Halves(), texts=None)
    return tmp_path / "out"


def test_a_shard_that_is_missing_or_cut_short_is_named(out: Path) -> None:
    shard = out / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is damaged: \d+ bytes, expected"):
        LatentShards(out)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is missing"):
        LatentShards(out)


def test_a_shard_of_other_content_is_named_when_it_is_verified(out: Path) -> None:
    shard = out / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    LatentShards(out)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is damaged: its sha256"):
        LatentShards(out, verify=True)


def test_a_shard_with_a_damaged_header_is_named_when_it_is_read(out: Path) -> None:
    shard = out / "shard-00001.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"shard .*shard-00001\.safetensors is damaged"):
        LatentShards(out).read(5)


def test_data_that_is_not_prepared_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is not a folder"):
        LatentShards(tmp_path / "none")
    with pytest.raises(DataError, match=r"index\.json is missing; run `ilf-trt prepare`"):
        LatentShards(tmp_path / "images")
    index = json.loads((out / "index.json").read_text())
    for change, part in (
        ({"schema": 9}, "schema 9"),
        ({"shape": 3}, "missing or wrong"),
        ({"shards": [{}]}, "missing or wrong"),
    ):
        (out / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DataError, match=part):
            LatentShards(out)
    (out / "index.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        Index.read(out)


def test_the_vae_gives_the_posteriors_mean_shifted_and_scaled(vae_folder: Path) -> None:
    vae, pixels = Vae.load(str(vae_folder)), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        want = (vae.model.encode(pixels).latent_dist.mean - 0.25) * 0.5
    torch.testing.assert_close(vae.encode(pixels, [0, 1]), want)


def test_a_size_that_is_no_multiple_of_the_vaes_cells_is_refused(vae_folder: Path) -> None:
    vae = Vae.load(str(vae_folder))
    with pytest.raises(InvalidRequest, match=rf"cells of {vae.cell}; give a --size that {vae.cell} divides, such as 8"):
        vae.encode(torch.zeros(1, 3, 9, 9), [0])


def test_a_drawn_latent_depends_on_seed_and_sample_and_not_on_the_batch(vae_folder: Path) -> None:
    pixels = torch.rand(2, 3, 8, 8)
    vae = Vae.load(str(vae_folder), sample=True, seed=3)
    both = vae.encode(pixels, [7, 8])
    torch.testing.assert_close(vae.encode(pixels[1:], [8]), both[1:])
    assert not torch.equal(Vae.load(str(vae_folder), sample=True, seed=4).encode(pixels, [7, 8]), both)
    assert not torch.equal(Vae.load(str(vae_folder)).encode(pixels, [7, 8]), both)


def test_a_vae_lies_in_a_folder_of_its_own_or_in_a_pipelines(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(vae_folder)
    assert Vae.load(str(tmp_path)).scale == 0.5


@pytest.mark.parametrize("source", ["none", "/none/none", "{tmp}", "no/such-model"])
def test_a_vae_that_cannot_be_loaded_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^(VAE .*give its folder|.*config\.json is missing; give the folder)"):
        Vae.load(source.format(tmp=tmp_path))
