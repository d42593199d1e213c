"""What a build shows in a terminal: a bar while it runs, tables when it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ilf_trt.assembly.conductor import BuildResult

MIB = 1 << 20


@contextmanager
def build_bar(stages: int) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """A bar of `stages` on standard error; gives what is called when a stage begins, and on a step within it."""
    with Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=stages, phase="")
        entered = 0

        def enter(stage: str) -> None:
            nonlocal entered
            bar.update(task, description=stage, completed=entered, phase="")
            entered += 1

        def step(phase: str, done: int, total: int) -> None:
            bar.update(task, phase=f"{phase} {done}/{total}")

        yield enter, step
        bar.update(task, description="done", completed=stages, phase="")


def print_build(result: BuildResult, console: Console) -> None:
    """What was verified, what the engines are, how long it took, what to do next."""
    if result.table is not None:
        console.print(result.table)
    if result.reports:
        console.print(import_module("ilf_trt.engines.report").report_table(result.reports))
    times = Table("stage", "seconds")
    for stage, seconds in result.stage_s.items():
        times.add_row(stage, f"{seconds:.1f}")
    console.print(times)
    path, spec, text = result.bundle.path, result.bundle.manifest.spec, result.bundle.manifest.text
    labels = any(port.name == "class_labels" for port in spec.conditions)
    arguments = "--labels 0-9 -o build/picture.png" if labels else "--conditions text.npz --latents-out latents.npy"
    if text is not None:
        arguments = '"a red fox" -o build/picture.png'
    following = f"generate {path} {arguments}"
    lines = [f"{path}: {result.bundle.size_bytes / MIB:.1f} MiB in {sum(result.stage_s.values()):.0f} s"]
    if result.reused:
        lines.insert(0, f"taken from the build cache: {', '.join(result.reused)}")
    if result.reports:
        following = f"inspect {path} --engines"
    for line in (*lines, f"next: ilf-trt {following}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
