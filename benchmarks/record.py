"""The rows of a measurement in a CSV: each names its machine, versions and commit, then its numbers."""

import csv
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ilf_trt.bench.environment import GPU_TOOLS, TOOLS, commit_of, cpu_name, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Records:
    """A folder of CSVs, and the facts that every new row states.

    `gpu` describes the measured GPU; it is empty for a CPU. `copies` is a second folder that gets a copy of every file.
    `commit` is for a machine without git.
    """

    folder: Path = RESULTS
    gpu: str = ""
    copies: Path | None = None
    commit: str = ""

    def environment(self) -> dict[str, str]:
        """The first columns of every row; the versions leave out packages that are not installed."""
        host = f"{cpu_name()}, {os.cpu_count()} cores"
        tools = (*TOOLS, *GPU_TOOLS) if self.gpu else TOOLS
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": self.commit or commit_of(ROOT) or "unknown",
            "device": f"{self.gpu}; {host}" if self.gpu else host,
            "python": platform.python_version(),
            "versions": " ".join(f"{tool}={number}" for tool, number in versions(tools).items()),
        }

    def write(self, name: str, command: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Replace `NAME.csv` by these rows; all have the same columns."""
        return self._put(name, [{**self.environment(), "command": command, **row} for row in rows])

    def append(self, name: str, command: str, rows: Sequence[Mapping[str, Any]], *, key: tuple[str, ...]) -> Path:
        """Add these rows to `NAME.csv`; they replace the rows with the same values in the columns `key`."""
        new_rows = [{**self.environment(), "command": command, **row} for row in rows]
        new_keys = {tuple(str(row[column]) for column in key) for row in new_rows}
        old_rows = [row for row in self.read(name) if tuple(row.get(column, "") for column in key) not in new_keys]
        return self._put(name, [*old_rows, *new_rows])

    def read(self, name: str) -> list[dict[str, str]]:
        """The rows of `NAME.csv`; empty if there is no such file."""
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _put(self, name: str, rows: list[dict[str, Any]]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.csv"
        draft = path.with_suffix(".partial")
        columns = dict.fromkeys([*rows[-1], *(column for row in rows for column in row)])
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(path)
        if self.copies is not None and self.copies.resolve() != self.folder.resolve():
            self.copies.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.copies / path.name)
        return path


def environment() -> dict[str, str]:
    """The first columns of every row that was measured on a CPU."""
    return Records().environment()


def write_rows(name: str, command: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Replace `results/NAME.csv` by these rows; all have the same columns."""
    return Records().write(name, command, rows)


def append_rows(name: str, command: str, rows: Sequence[Mapping[str, Any]], *, key: tuple[str, ...]) -> Path:
    """Add these rows to `results/NAME.csv`; they replace the rows with the same values in the columns `key`."""
    return Records().append(name, command, rows, key=key)


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of `results/NAME.csv`; empty if there is no such file."""
    return Records().read(name)
