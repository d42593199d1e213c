"""From pictures to a trained feedback block: prepare, train, resume, two ranks."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler

from ilf_trt import attach
from ilf_trt.model.base import base_scheduler
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.train.batch_stream import BatchStream, StreamItem
from ilf_trt.train.checkpoints import Base
from ilf_trt.train.data import fit_stream, open_stream
from ilf_trt.train.data.text import Text
from ilf_trt.train.loop import Outcome, RunSetup, train
from ilf_trt.train.recipe import Recipe
from tests.conftest import LOOP, TEXT_TOKENS, Run, small_dit, small_pixart
from tests.ilf_trt.train.data.conftest import Pull, Words, write_captions, write_classes, write_tar

BATCH = 4


class Noting:
    """A stream that keeps the keys of its batches."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream, self.null, self.keys = stream, stream.null, dict[int, list[str]]()

    def batches(self, *, start_iteration: int, rank: int, world: int) -> Iterator[StreamItem]:
        for iteration, keys, batch in self.stream.batches(start_iteration=start_iteration, rank=rank, world=world):
            self.keys[iteration] = list(keys)
            yield iteration, keys, batch


def recipe(data: dict[str, Any], iterations: int, **changes: Any) -> Recipe:
    return Recipe.from_table(
        {
            "seed": 0,
            "model": {"base": "base", "loop": f"{LOOP[0]}:{LOOP[1]}"},
            "data": data,
            "optimisation": {
                "iterations": iterations,
                "batch_size": BATCH,
                "lr": 1e-4,
                "scale_lr": 1e-3,
                "weight_decay": 0.0,
                "warm_up": 0,
                "clip": 1.0,
            },
            "loss": {"kind": "fast", "second_pass": "t", "condition_dropout": 0.5},
            "checkpoint": {"every": 1},
            "compute": {"deterministic": False},
            **changes,
        }
    )


def train_on(base: Any, data: dict[str, Any], output: Path, *, iterations: int = 2) -> tuple[Outcome, Noting]:
    base.save_pretrained(output / "base" / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(output / "base" / "scheduler")
    source = str(output / "base" / "transformer")
    small = recipe(data, iterations)
    model = attach(base, LOOP)
    stream = Noting(fit_stream(open_stream(data, global_batch=BATCH, seed=small.seed), model.adapter))
    setup = RunSetup(output / "training", Base(source, fingerprint(base)), base_scheduler(source), cpu=True)
    return train(model, small, stream, setup), stream


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Stands in where a text encoder would be loaded."""
    encoder = Words()
    monkeypatch.setattr(Text, "load", lambda *_, **options: encoder)
    return encoder


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_pixart_trains_on_prepared_captions(
    dtype: str, words: Words, run: Run, vae_folder: Path, tmp_path: Path
) -> None:
    write_captions(tmp_path / "captions", 10, side=40)
    (tmp_path / "captions" / "3.png").write_bytes(b"broken")
    out = tmp_path / "out"
    options = ("--size", 32, "--shard-size", 4, "--text-tokens", TEXT_TOKENS, "--dtype", dtype, "-o", out)
    result = run(
        *("prepare", "--data-kind", "images", "--path", tmp_path / "captions"),
        *("--vae", vae_folder, "--text-encoder", "t5", *options),
    )
    assert result.code == 0, result.err
    assert "9 samples of 4x16x16 with text, 1 broken" in result.out
    table = {"kind": "latents", "path": str(out)}
    outcome, stream = train_on(small_pixart(sized=True), table, tmp_path / "run")
    assert (outcome.iteration, outcome.stopped) == (2, False)
    assert isfinite(outcome.mean_loss)
    assert "3.png" not in {key for keys in stream.keys.values() for key in keys}


def test_a_dit_trains_on_a_folder_of_pictures_past_the_broken_ones(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "images", {str(number): 2 for number in range(10)})
    (folder / "4" / "0.png").write_bytes(b"broken")
    table = {"kind": "images", "path": str(folder), "size": 8, "channels": 1, "flip": True}
    outcome, stream = train_on(small_dit(), table, tmp_path / "run", iterations=5)
    assert outcome.iteration == 5
    keys = [key for keys in stream.keys.values() for key in keys]
    assert "4/0.png" not in keys
    assert len(set(keys)) == 19


def test_a_training_that_goes_on_in_the_middle_of_an_epoch_sees_the_same_rows(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "images", {"cat": 5, "dog": 6})
    table = {"kind": "images", "path": str(folder), "size": 8, "channels": 1}
    _, whole = train_on(small_dit(), table, tmp_path / "whole", iterations=4)
    _, first = train_on(small_dit(), table, tmp_path / "parts", iterations=2)
    _, then = train_on(small_dit(), table, tmp_path / "parts", iterations=4)
    assert min(then.keys) == 3
    assert [first.keys[i] for i in (1, 2)] == [whole.keys[i] for i in (1, 2)]
    assert [then.keys[i] for i in (3, 4)] == [whole.keys[i] for i in (3, 4)]


def test_two_ranks_read_the_rows_of_one(tmp_path: Path, pull: Pull) -> None:
    folder = write_classes(tmp_path / "images", {"cat": 5, "dog": 6})
    (folder / "cat" / "1.png").write_bytes(b"broken")
    streams = [
        open_stream({"kind": "images", "path": str(folder), "size": 8}, global_batch=BATCH, seed=1) for _ in range(3)
    ]
    parts = [pull(stream, 5, rank=rank, world=2) for rank, stream in enumerate(streams[:2])]
    assert [a[1] + b[1] for a, b in zip(*parts, strict=True)] == [keys for _, keys in pull(streams[2], 5)]


def test_the_command_prepares_labels_from_shards_and_goes_on(run: Run, vae_folder: Path, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "images", {"cat": 3})
    members = {}
    for number in range(3):
        members |= {f"{number}.png": (folder / "cat" / f"{number}.png").read_bytes(), f"{number}.cls": b"1"}
    shard = write_tar(tmp_path / "a.tar", members)
    command = ("prepare", "--data-kind", "webdataset", "--path", shard, "--vae", vae_folder, "-o", tmp_path / "out")
    for _ in range(2):
        result = run(*command, "--size", 8)
        assert result.code == 0, result.err
        assert "3 samples of 4x4x4 with label, 0 broken" in " ".join(result.out.split())
        assert "--set data.kind=latents" in result.out
    run(*command, "--size", 16).refused("size was 8 and is 16", "another --output")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--path", "{tmp}/none"), "is not a folder"),
        (("--path", "{tmp}/images", "--size", 0), "size is 0"),
        (("--path", "{tmp}/images", "--batch", 0), "batch is 0"),
        (("--path", "{tmp}/images"), "--vae"),
        (("--path", "{tmp}/images", "--vae", "{tmp}/images"), "config.json is missing"),
        (("--path", "{tmp}/images", "--device", "tpu"), "device 'tpu' cannot be used"),
    ],
)
def test_the_command_says_what_is_wrong(options: tuple[object, ...], part: str, run: Run, tmp_path: Path) -> None:
    write_classes(tmp_path / "images", {"cat": 1})
    tokens = [str(option).format(tmp=tmp_path) for option in options]
    run("prepare", "--data-kind", "images", "-o", tmp_path / "out", *tokens).refused(part)


def test_the_train_command_reads_a_folder_of_pictures(run: Run, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "images", {"cat": 3, "dog": 3})
    base = tmp_path / "base"
    small_dit(in_channels=3, out_channels=3).save_pretrained(base / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(base / "scheduler")
    command = ("train", "--config", "demo", "--cpu", "--output", tmp_path / "out")
    settings = {
        "model.base": base,
        "model.loop": f"{LOOP[0]}:{LOOP[1]}",
        "data.kind": "images",
        "data.path": folder,
        "optimisation.iterations": 2,
        "optimisation.batch_size": 4,
        "logging.samples_every": 0,
    }
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    run(*command, *changes).refused("data.size is missing")
    run(*command, *changes, "--set", "data.size=16").refused("the base takes (3, 8, 8)")
    result = run(*command, *changes, "--set", "data.size=8")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "ilf.json").is_file()
