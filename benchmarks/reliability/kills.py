"""Kills commands at random moments, and looks at what they left.

    python -m benchmarks.reliability.kills [--commands generate build prepare train] [--kills 40] [--seed 0]

Each kill runs one command over the output of an earlier run, and sends SIGKILL, SIGTERM or SIGINT in turn at a random
moment of the time that the command takes. Afterwards the output must be the earlier one or the new one, whole, to the
bit. A training is killed until it ends, and must then have the weights of one that nobody killed.
"""

import argparse
import hashlib
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import append_rows
from ilf_trt.files import DRAFT, remove_folder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PICTURES, SIDE = 40, 32
MOST_S = 120.0
DECIDING = (".safetensors", ".onnx", ".data", ".npz")
TRAINING = (
    "--set=optimisation.iterations=60",
    "--set=checkpoint.every=5",
    "--set=logging.samples_every=0",
    "--set=optimisation.batch_size=8",
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, what it writes, and whether a killed run leaves a part that the next run goes on from."""

    name: str
    words: tuple[str, ...]
    output: Path
    goes_on: bool = False


def commands_of(folder: Path) -> dict[str, Command]:
    """The commands by name; their inputs are made here."""
    pictures, vae, bundle = folder / "pictures", folder / "vae", folder / "demo.ilf"
    run(("build", "--checkpoint", "demo", "-o", str(bundle), "--cache-dir", str(folder / "cache")))
    _write_pictures(pictures)
    _write_vae(vae)
    words = {
        "generate": ("generate", str(bundle), "--labels", "0-9", "--threads", "1", "-o"),
        "build": ("build", "--checkpoint", "demo", "--no-cache", "--force", "-o"),
        "prepare": ("prepare", "--data-kind", "images", "--path", str(pictures), "--vae", str(vae), "--size", "32"),
        "train": ("train", "--config", "demo", "--cpu", *TRAINING, "--output"),
    }
    words["prepare"] = (*words["prepare"], "--shard-size", "8", "--batch", "4", "-o")
    outputs = {"generate": "a.png", "build": "a.ilf", "prepare": "latents", "train": "training"}
    return {
        name: Command(name, (*line, str(folder / outputs[name])), folder / outputs[name], name in ("prepare", "train"))
        for name, line in words.items()
    }


def run(words: tuple[str, ...]) -> float:
    """Run a command to its end; the seconds that it took."""
    begin_s = time.monotonic()
    subprocess.run(_line(words), check=True, capture_output=True, timeout=MOST_S)
    return time.monotonic() - begin_s


def kill(words: tuple[str, ...], number: signal.Signals, after_s: float) -> tuple[int, bool]:
    """Run a command and send it a signal; its exit code, and whether it still ran then."""
    process = subprocess.Popen(_line(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(after_s), False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait(MOST_S), True


def measure(command: Command, kills: int, moments: random.Random) -> list[dict[str, Any]]:
    """One row for each signal."""
    took_s = run(command.words)
    wanted = digest_of(command.output)
    counts: dict[signal.Signals, Counter[str]] = {number: Counter() for number in SIGNALS}
    if command.goes_on:
        remove_folder(command.output)
    for index in range(kills):
        number, before = SIGNALS[index % len(SIGNALS)], drafts_in(command.output.parent)
        count = counts[number]
        code, sent = kill(command.words, number, moments.uniform(0, took_s))
        count["kills"] += 1
        count["ended before"] += not sent
        count["went on to the end"] += sent and code == 0
        count["other exit code"] += code not in (0, -number, 128 + number)
        count["died of the signal"] += number is not signal.SIGKILL and code == -number
        count["drafts left"] += bool(drafts_in(command.output.parent) - before)
        if command.goes_on:
            if code == 0:  # a whole run: hold it against the first one, and begin again
                count["other result"] += digest_of(command.output) != wanted
                remove_folder(command.output)
        else:
            count["output destroyed"] += digest_of(command.output) != wanted
    run(command.words)
    left = len(drafts_in(command.output.parent))
    final = digest_of(command.output) != wanted
    return [
        {
            "command": command.name,
            "signal": number.name,
            "seconds": round(took_s, 2),
            **{name: counts[number][name] for name in COUNTED},
            "other result at the end": int(final),
            "drafts left at the end": left,
        }
        for number in SIGNALS
    ]


COUNTED = (
    "kills",
    "ended before",
    "went on to the end",
    "output destroyed",
    "other result",
    "other exit code",
    "died of the signal",
    "drafts left",
)


def digest_of(path: Path) -> str:
    """sha256 of a file, or of the files of a folder that decide what it is good for."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.suffix in DECIDING and "steps" not in file.parts)
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def drafts_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if DRAFT in path.name}


def _line(words: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "ilf_trt.cli", *words]


def _write_pictures(folder: Path) -> None:
    random_pixels = np.random.default_rng(0)
    for label in ("bus", "cat"):
        (folder / label).mkdir(parents=True)
        for number in range(PICTURES // 2):
            pixels = random_pixels.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def _write_vae(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(folder)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="+", default=["generate", "build", "prepare", "train"])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    line = shlex.join(["python", "-m", "benchmarks.reliability.kills", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_of(Path(folder))
        for name in options.commands:
            rows = measure(commands[name], options.kills, random.Random(options.seed))
            for row in rows:
                print(row, flush=True)
            print(append_rows("reliability-kills", line, [{"killed": row.pop("command"), **row} for row in rows],
                              key=("killed", "signal")))  # fmt: skip


if __name__ == "__main__":
    main()
