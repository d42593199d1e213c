"""The cost of what keeps results sound: the check for NaN and infinity, and the seal of the build cache.

    python -m benchmarks.reliability.cost [--turns 200]

Each turn runs a generation with the check and one without it, in both orders in turn; the ratio is taken within a turn.
For the cache, a turn takes the files of a bundle from it, and copies the same files without any check.
"""

import argparse
import hashlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.record import append_rows
from ilf_trt.assembly.build_cache import BuildCache
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.contract.arrays import is_finite
from ilf_trt.files import copy_file
from ilf_trt.runtime import Pipeline, host

MIB = 1 << 20
REQUESTS: dict[str, dict[str, Any]] = {"demo": {"class_labels": [3]}, "demo-emoji": {"prompt": "smiling cat"}}
WARM_UP = 5


def ratios_of(with_it: Callable[[], object], without: Callable[[], object], turns: int) -> list[float]:
    """Time with it over time without, once a turn."""
    for _ in range(WARM_UP):
        with_it(), without()
    ratios = []
    for turn in range(turns):
        pair = (with_it, without) if turn % 2 else (without, with_it)
        times = {run: _seconds(run) for run in pair}
        ratios.append(times[with_it] / times[without])
    return ratios


def finite_check(name: str, bundle: Path, turns: int) -> dict[str, Any]:
    with Pipeline.load(bundle, threads=1, sessions=1) as pipeline:

        def run(check: Callable[[Any], bool]) -> object:
            host.is_finite = check
            return pipeline.generate(**REQUESTS[name])

        def checked() -> object:
            return run(is_finite)

        def unchecked() -> object:
            return run(_passes)

        return _row("finite check", name, ratios_of(checked, unchecked, turns))


def sealed_cache(name: str, bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    files = {
        path.relative_to(bundle).as_posix().replace("/", "-"): path for path in bundle.rglob("*") if path.is_file()
    }
    cache, places = BuildCache(folder / "cache"), {name: folder / "taken" / name for name in files}
    (folder / "taken").mkdir(exist_ok=True)
    key = hashlib.sha256(name.encode()).hexdigest()
    cache.put(key, files, {"graph": "cost", "model": name, "precision": "fp32", "target": "onnx", "version": "0"})

    def taken() -> None:
        if cache.take(key, places) is None:
            raise RuntimeError("the cache has no such entry")

    def copied() -> None:
        for name, path in files.items():
            copy_file(path, places[name])

    size_mib = sum(path.stat().st_size for path in files.values()) / MIB
    row = _row("sealed cache", name, ratios_of(taken, copied, turns))
    return {**row, "ms": round(1e3 * median(_seconds(taken) for _ in range(WARM_UP)), 2), "MiB": round(size_mib, 1)}


def _passes(_: object) -> bool:
    return True


def _row(what: str, name: str, ratios: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(ratios, n=4)
    return {
        "what": what,
        "model": name,
        "turns": len(ratios),
        "ratio": round(median(ratios), 4),
        "lower quartile": round(low, 4),
        "upper quartile": round(high, 4),
    }


def _seconds(run: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    run()
    return time.perf_counter() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=200)
    options = parser.parse_args()
    line = shlex.join(["python", "-m", "benchmarks.reliability.cost", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in REQUESTS:
            bundle = bundle_of(model, folder / "bundles")
            rows = [finite_check(model, bundle, options.turns), sealed_cache(model, bundle, folder, options.turns)]
            for row in rows:
                print(row, flush=True)
            append_rows("reliability-cost", line, rows, key=("what", "model"))


if __name__ == "__main__":
    main()
