"""Mixes generations from many threads for some minutes: same bits as one thread alone, and nothing grows.

    python -m benchmarks.reliability.soak [--minutes 5] [--threads 16] [--sessions 3]

Requests differ in labels or prompts, number of pictures, steps, feedback, guidance and seed; some are cancelled, some
wait too short, some fail in their own `progress`, and threads warm up in between. Memory, descriptors and threads are
read once a second. Growth is the median of the last quarter less that of the second.
"""

import argparse
import gc
import os
import random
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.record import append_rows
from benchmarks.speed.serving import resident_mib
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.errors import Cancelled, IlfError, TimedOut
from ilf_trt.runtime import Pipeline

KINDS = 12
WORDS = ("smiling cat", "red heart", "sunflower", "green apple")


class _Stop(Exception):
    """Raised inside of `progress`."""


def requests_of(pipeline: Pipeline, draws: random.Random) -> list[dict[str, Any]]:
    """Some requests, each with its own plan, size of batch, guidance and seed."""
    made = []
    for _ in range(KINDS):
        pictures = draws.choice((1, 1, 2, 3))
        steps, feedback = draws.choice((3, 5, 8)), draws.choice(("all", "none", "outer:1"))
        what: dict[str, Any] = (
            {"class_labels": [draws.randrange(10) for _ in range(pictures)]}
            if pipeline.manifest.text is None
            else {"prompt": [draws.choice(WORDS) for _ in range(pictures)]}
        )
        made.append({
            **what,
            "plan": pipeline.plan(steps, feedback=feedback),
            "guidance_scale": draws.choice((1.0, 1.5, 4.0)),
            "seed": draws.randrange(1 << 31),
        })  # fmt: skip
    return made


def soak(bundle: Path, *, minutes: float, threads: int, sessions: int) -> dict[str, Any]:
    """The numbers of one run over a bundle."""
    with Pipeline.load(bundle, threads=1, sessions=1) as alone:
        requests = requests_of(alone, random.Random(1))
        wanted = [alone.generate(**request).latents for request in requests]
    counts: Counter[str] = Counter()
    samples: list[tuple[float, int, int]] = []
    lock, end = threading.Lock(), threading.Event()
    with Pipeline.load(bundle, threads=1, sessions=sessions) as pipeline:

        def work(seed: int) -> None:
            draws = random.Random(seed)
            while not end.is_set():
                outcome = one(pipeline, requests, wanted, draws)
                with lock:
                    counts[outcome] += 1

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        until_s = time.monotonic() + 60 * minutes
        while time.monotonic() < until_s:
            time.sleep(1)
            samples.append((resident_mib(), len(os.listdir("/proc/self/fd")), threading.active_count()))  # noqa: PTH208
        end.set()
        for worker in workers:
            worker.join(60)
        counts["threads that hang"] = sum(worker.is_alive() for worker in workers)
    gc.collect()
    quarter = max(len(samples) // 4, 1)
    growth = [
        median(sample[column] for sample in samples[-quarter:])
        - median(sample[column] for sample in samples[quarter : 2 * quarter])
        for column in range(3)
    ]
    return {
        "minutes": minutes,
        "threads": threads,
        "sessions": sessions,
        "generations": counts["same"],
        "other bits": counts["other bits"],
        "cancelled": counts["cancelled"],
        "timed out": counts["timed out"],
        "stopped by progress": counts["stopped"],
        "warm-ups": counts["warm-up"],
        "other errors": counts["error"],
        "threads that hang": counts["threads that hang"],
        "growth MiB": round(growth[0], 1),
        "growth descriptors": growth[1],
        "growth threads": growth[2],
        "peak MiB": round(max(sample[0] for sample in samples), 1),
    }


def one(pipeline: Pipeline, requests: list[dict[str, Any]], wanted: list[Any], draws: random.Random) -> str:
    """Make one request; how it ended."""
    kind = draws.random()
    index = draws.randrange(len(requests))
    options: dict[str, Any] = {}
    if kind < 0.05:
        pipeline.warm_up(1)
        return "warm-up"
    if kind < 0.15:
        options["cancel"] = threading.Event()
        threading.Timer(draws.uniform(0, 0.02), options["cancel"].set).start()
    elif kind < 0.25:
        options["timeout"] = draws.uniform(0, 0.02)
    elif kind < 0.35:
        options["progress"] = _fail
    try:
        result = pipeline.generate(**requests[index], **options)
    except Cancelled:
        return "cancelled"
    except TimedOut:
        return "timed out"
    except _Stop:
        return "stopped"
    except IlfError as error:
        print(error, flush=True)
        return "error"
    return "same" if np.array_equal(result.latents, wanted[index]) else "other bits"


def _fail(*_: object) -> None:
    raise _Stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["demo", "demo-emoji"])
    options = parser.parse_args()
    line = shlex.join(["python", "-m", "benchmarks.reliability.soak", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            bundle = bundle_of(name, Path(folder))
            row = soak(bundle, minutes=options.minutes, threads=options.threads, sessions=options.sessions)
            print(row, flush=True)
            print(append_rows("reliability-soak", line, [{"model": name, **row}], key=("model",)))


if __name__ == "__main__":
    main()
