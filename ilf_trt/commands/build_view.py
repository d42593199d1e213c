"""What a build prints when it is done."""

from rich.console import Console
from rich.table import Table

from ilf_trt import leaves
from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.contract.ports import Role

from .terminal import cell, say

MIB = 1 << 20


def print_build(result: BuildResult, console: Console) -> None:
    """What was verified, what the engines are, how long it took, what to do next."""
    if result.differences:
        console.print(leaves.difference_table(result.differences))
    if result.reports:
        console.print(leaves.report_table(result.reports))
    times = Table("stage", "seconds")
    for stage, seconds in result.stage_s.items():
        times.add_row(cell(stage), f"{seconds:.1f}")
    console.print(times)
    path, spec, text = result.bundle.path, result.bundle.manifest.spec, result.bundle.manifest.text
    has_labels = spec.conditioning.port(Role.LABEL) is not None
    arguments = "--labels 0-9 -o build/picture.png" if has_labels else "--conditions text.npz --latents-out latents.npy"
    if text is not None:
        arguments = '"a red fox" -o build/picture.png'
    following = f"generate {path} {arguments}"
    parts = {"text encoder": text, "decoder": result.bundle.manifest.decoder}
    precisions = ", ".join(f"{name} {part.precision}" for name, part in parts.items() if part is not None)
    lines = [f"{path}: {result.bundle.size_bytes / MIB:.1f} MiB in {sum(result.stage_s.values()):.0f} s"]
    if precisions:
        lines.insert(0, f"precision: {spec.kind} {result.bundle.manifest.precision}, {precisions}")
    if result.reused:
        lines.insert(0, f"taken from the build cache: {', '.join(result.reused)}")
    if result.reports:
        following = f"inspect {path} --engines"
    say(*lines, f"next: ilf-trt {following}", console=console)
