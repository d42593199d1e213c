"""The build: export, verify, put in place; each stage is loaded by name when its turn comes."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from ilf_trt.bundle import Bundle, drafted
from ilf_trt.contract import GRAPHS, Batch, Precision
from ilf_trt.schedule import DEFAULT_FEEDBACK, Ratio, Rule

DEFAULT_BATCH = Batch(1, 4, 16)
STAGES = ("load checkpoint", "reference", *(f"export {name}" for name in GRAPHS), "verify")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that changes what a build makes."""

    base: str | None = None
    precision: Precision = Precision.FP32
    wide_residual: bool = False
    batch: Batch = DEFAULT_BATCH
    guidance: bool = True
    guidance_scale: float = 1.5
    steps: int = 10
    feedback: str = DEFAULT_FEEDBACK
    rule: Rule = Rule.ANNEAL
    ratio: Ratio = Ratio.LOOP_TO_MODEL
    scheduler: str | None = None
    text_tokens: int = 300
    verify: bool = True
    max_error: float | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The bundle, seconds by stage, and what verify measured (None when it was skipped)."""

    bundle: Bundle
    stage_s: dict[str, float]
    differences: tuple[Any, ...]
    table: Any


def build(
    checkpoint: str,
    output: str | Path,
    options: BuildOptions,
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> BuildResult:
    """Build a bundle from a checkpoint; `progress` is told each stage's name as it begins.

    Nothing stands at `output` until everything is written and verified; an old bundle there stays whole until then.
    Raises any error of the tree.
    """
    stage_s: dict[str, float] = {}
    began = perf_counter()
    current = ""

    def enter(stage: str) -> None:
        nonlocal began, current
        now = perf_counter()
        if current:
            stage_s[current] = now - began
        began, current = now, stage
        if stage:
            progress(stage)

    differences: tuple[Any, ...] = ()
    table = None
    with drafted(output, force=force) as draft:
        manifest = import_module("ilf_trt.export.command").export_bundle(checkpoint, draft, options, enter)
        if options.verify:
            enter("verify")
            checks = import_module("ilf_trt.runtime.verify")
            differences, precision = checks.verify(draft)
            checks.check(differences, precision.parity_limit if options.max_error is None else options.max_error)
            table = checks.table(differences)
        enter("")
    return BuildResult(Bundle(Path(output), manifest), stage_s, differences, table)
