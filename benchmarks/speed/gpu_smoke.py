"""The smoke test of a GPU host: every assumption of docs/runtime.md, and what a server does to the runtime.

    python -m benchmarks.speed.gpu_smoke                  # at most five minutes
    python -m benchmarks.speed.gpu_smoke --check dlpack load
    python -m benchmarks.tables

Each row of benchmarks/results/gpu-smoke.csv ends in "holds", in "not tried" with the reason, or in what happened. The
checks run in a process of their own. If one ends that process, hangs, or loses the GPU, the rest run in a new process.

`--dry-run` runs the checks on stand-ins in host memory, and writes to --output alone. It shows that the checks work.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic, perf_counter
from typing import Any

from benchmarks.record import RESULTS, ROOT, Records
from benchmarks.speed.machine import DRY_RUN, Machine
from benchmarks.speed.smoke_checks import CHECKS, Check
from benchmarks.speed.smoke_ground import CudaGround, Ground, NotTried
from benchmarks.speed.smoke_table import HOLDS, NOT_TRIED, SMOKE
from ilf_trt.errors import DeviceError, DeviceLost, one_line

KEY = ("gpu", "check")
CHECK_S = 120.0  # a check that takes longer hangs; the first one also loads torch
END = {"end": True}
WORK, DRY_OUTPUT = Path("build/gpu-smoke"), Path("build/gpu-smoke-dry-run")
NO_TIME = f"{NOT_TRIED}: no time was left"

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    logging.disable(logging.WARNING)
    checks = [check for check in CHECKS if check.name in (options.check or [each.name for each in CHECKS])]
    if options.inside:
        return inside(checks, options.work)
    try:
        machine = Machine(dry_run=options.dry_run)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder, copies, gpu = RESULTS, options.output, machine.description
    if options.dry_run:
        folder, copies, gpu = options.output or DRY_OUTPUT, None, f"no GPU, {DRY_RUN}"
    records = Records(folder, gpu, copies, options.commit)
    command = shlex.join(["python", "-m", "benchmarks.speed.gpu_smoke", *(arguments or sys.argv[1:])])
    rows = dry_rows(checks, options.work) if options.dry_run else rows_of_children(checks, options)
    outcomes = []
    for row in rows:
        records.append(SMOKE, command, [{"gpu": machine.gpu, **row}], key=KEY)
        print(f"{row['check']}: {row['outcome']} ({row['facts'] or '-'}; {row['seconds']} s)", flush=True)
        outcomes.append(row["outcome"])
    hold, untried = (sum(each.startswith(words) for each in outcomes) for words in (HOLDS, NOT_TRIED))
    failed = len(outcomes) - hold - untried
    print(f"{hold} assumptions hold, {untried} were not tried, {failed} do not hold")
    return 1 if failed else 0


def inside(checks: list[Check], work: Path) -> int:
    """Run checks on the GPU of this process, one line of JSON for each and END; stop when the GPU is lost."""
    ground = CudaGround(work)
    for check in checks:
        row, usable = tried(check, lambda: nullcontext(ground))
        print(json.dumps(row), flush=True)
        if not usable:
            break
    print(json.dumps(END), flush=True)
    return 0


def dry_rows(checks: list[Check], work: Path) -> Iterator[Row]:
    """Run checks on stand-ins, each on new ones."""
    from benchmarks.speed.stand_ins import stand_in_ground

    for check in checks:
        yield tried(check, lambda: stand_in_ground(work))[0]


def tried(check: Check, opening: Callable[[], AbstractContextManager[Ground]]) -> tuple[Row, bool]:
    """The row of one check, and whether the process can still use its GPU."""
    begin_s, facts, usable = perf_counter(), "", not check.loses_gpu
    try:
        with opening() as ground:
            facts = check.run(ground)
        outcome = HOLDS
    except NotTried as reason:
        outcome = f"{NOT_TRIED}: {reason}"
    except Exception as error:
        usable = usable and not isinstance(error, DeviceLost)
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        outcome = f"{kind}{one_line(error)}"[:400]
    return _row(check, outcome, facts, perf_counter() - begin_s), usable


def rows_of_children(checks: list[Check], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of checks that run in processes of their own, until `--minutes` are over."""
    end_s, left = monotonic() + 60 * options.minutes, list(checks)
    while left:
        if monotonic() > end_s:
            yield from (_row(check, NO_TIME, "", 0.0) for check in left)
            return
        names = [check.name for check in left]
        command = [*options.command, "--inside", "--work", str(options.work.resolve()), "--check", *names]
        yield from rows_of_child(command, left, min(CHECK_S, max(end_s - monotonic(), 1.0)))


def rows_of_child(command: list[str], left: list[Check], limit_s: float) -> Iterator[Row]:
    """The rows of one process; takes what it tried from `left`, at least one check.

    Blames the first check without a row if the process ends without END, or if nothing comes for `limit_s`.
    """
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines: Queue[str] = Queue()
    reader = Thread(target=_read, args=(child, lines), daemon=True)
    reader.start()
    try:
        while left:
            begin_s = perf_counter()
            try:
                line = lines.get(timeout=limit_s)
            except Empty:
                yield _row(left.pop(0), f"hung for {limit_s:.0f} s, so its process was ended", "", limit_s)
                return
            if not line:
                outcome = f"its process ended with exit code {child.wait()}"
                yield _row(left.pop(0), outcome, "", perf_counter() - begin_s)
                return
            row = json.loads(line)
            if row == END:
                return
            left.pop(0)
            yield row
    finally:
        child.kill()
        child.wait()
        reader.join()


def _read(child: subprocess.Popen[str], lines: "Queue[str]") -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.startswith("{"):
                lines.put(line)
    lines.put("")


def _row(check: Check, outcome: str, facts: str, seconds: float) -> Row:
    return {
        "check": check.name,
        "assumption": check.assumption,
        "outcome": outcome,
        "facts": facts,
        "seconds": round(seconds, 2),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="+", choices=[check.name for check in CHECKS], help="only these checks")
    parser.add_argument("--minutes", type=float, default=4.5, help="checks begin until then")
    parser.add_argument("--output", type=Path, help="folder for a copy of the CSV")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for bundles")
    parser.add_argument("--commit", default="", help="commit for the rows, on a machine without git")
    parser.add_argument("--dry-run", action="store_true", help="run the checks on stand-ins in host memory")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(command=[sys.executable, "-m", "benchmarks.speed.gpu_smoke"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
