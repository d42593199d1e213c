"""One CSV row of a measurement: where and with what it was made, then its numbers."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TOOLS = ("ilf-trt", "torch", "diffusers", "onnx", "onnxruntime", "numpy", "tensorrt-rtx-cu13", "polygraphy")


def environment() -> dict[str, str]:
    """Columns that every row begins with."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": " ".join(f"{tool}={version(tool)}" for tool in TOOLS),
    }


def write_rows(name: str, command: str, rows: list[Mapping[str, Any]]) -> Path:
    """Replace `results/NAME.csv` by these rows; all have the same columns."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    shared = {**environment(), "command": command}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*shared, *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)
    return path


def append_rows(name: str, command: str, rows: list[Mapping[str, Any]], *, key: tuple[str, ...]) -> Path:
    """Put these rows into `results/NAME.csv`, in place of those that agree with them in `key`."""
    made = [{**environment(), "command": command, **row} for row in rows]
    new = {tuple(str(row[name]) for name in key) for row in made}
    kept = [row for row in read_rows(name) if tuple(row[name] for name in key) not in new]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *made])
    return path


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of `results/NAME.csv`; empty when it was never measured."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
