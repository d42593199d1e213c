r"""The benchmark of a GPU host, in pieces that resume: facts, engines, parity, and the latency of every rival.

    python -m benchmarks.speed.gpu --piece facts
    python -m benchmarks.speed.gpu --piece build --model dit-xl-256 --batch 1 --minutes 9
    python -m benchmarks.speed.gpu --piece parity latency plot --model dit-xl-256 --batch 1 --minutes 9
    python -m benchmarks.tables

A call stops before its deadline and lists the work that is left; the same command continues there. Without --again it
skips the rows that benchmarks/results/gpu-*.csv already has for this GPU. If a library is missing, or refuses the GPU,
the row states the reason. `--output DIR` gets a copy of every file, the table and the plot. Bundles and checkpoints
(random weights) stay under --work.

To run from a checkout without an installation and without a package registry, use one of

    export PYTHONPATH=$(python -m benchmarks.checkout)
    pip install --no-deps --no-build-isolation -e .

docs/performance.md, "Speed on a GPU", names the wheels that such a host needs. `--row` and `--skip` take names or short
names of rows, so that one call fits the time at hand; the rows of `torch-graph` need no engine library:

    python -m benchmarks.speed.gpu --piece facts latency --model pixart-alpha-1024 dit-xl-256 --batch 1 --minutes 5.5 \
        --row eager eager-equal eager-ilf captured captured-equal captured-ilf compiled --row-seconds 6

`--dry-run` runs every piece on the CPU with a tiny model, ONNX Runtime and the host's clock, and writes to --output
alone. It shows that the commands work; its numbers measure nothing.

| number | meaning |
|---|---|
| `denoise` | the device's time by CUDA events, from the first work of a trajectory to the last |
| `end to end` | the host's time from conditions and noise in numpy to latents in numpy, without text encoder and VAE |
| faster than eager | the ratio to eager diffusers at 20 steps; both alternate, and a ratio compares neighbours |
| `cold load` | from files to the first latents, with the libraries loaded; for torch.compile with the compilation |
| memory | growth of the whole GPU's used memory since before the row was loaded |
| `of the matrix rate` | operations of the Linears over the time of all graphs, as a share of the best square product |

Engines in `fp8` keep attention in FP16. `fp8-attention` has it in FP8 too, as `ilf-trt build --precision fp8` does from
64 image tokens on. Rows of torch are in --dtype. The rows "captured … by torch" run the runtime's own trajectory with
torch in the place of an engine library: one CUDA graph, and no compiler.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from benchmarks.record import RESULTS, Records
from benchmarks.rivals.full_size_models import MODELS, TINY
from benchmarks.speed.gpu_pieces import Deadline, Job, build_bundle, facts, latency, parity
from benchmarks.speed.gpu_tables import FP8_ATTENTION, LATENCY, Row, gpu_latency, gpu_limits
from benchmarks.speed.machine import DRY_RUN, DTYPES, Machine
from benchmarks.speed.rows import ONNXRUNTIME, SLUGS, Bench, row_named
from ilf_trt.contract.target import Library
from ilf_trt.errors import DeviceLost, IlfError
from ilf_trt.model.sampling import CompileMode, CompileOptions

PIECES = ("facts", "build", "parity", "latency", "plot")
DEFAULT_MODELS = ["dit-xl-256", "pixart-alpha-512", "pixart-alpha-1024"]
LIBRARIES = [*(library.value for library in Library), ONNXRUNTIME]
PRECISIONS = ["fp16", "fp8", FP8_ATTENTION]
WORK, DRY_OUTPUT = Path("build/gpu"), Path("build/gpu-dry-run")
DRY_TITLE = "**A dry run on a CPU with a tiny model: these numbers measure no GPU and no model.**"


def main() -> int:
    options = _options()
    logging.disable(logging.WARNING)
    try:
        job = _job(options)
    except IlfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lost = None
    try:
        for piece in options.piece:
            _piece(job, piece)
    except DeviceLost as error:
        lost = error
    rows = job.records.read(LATENCY)
    output = job.records.copies or job.records.folder
    if rows and (options.output or options.dry_run):
        title = f"{DRY_TITLE}\n\n" if options.dry_run else ""
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{LATENCY}.md").write_text(title + gpu_latency(rows) + "\n")
    print(*([DRY_TITLE] if options.dry_run else gpu_limits(rows)), sep="\n")
    left = job.deadline.left
    print(f"left for another call: {len(left)}", *left, sep="\n  " if left else "\n")
    if lost is not None:
        print(f"error: {lost}", file=sys.stderr)
    return 0 if lost is None else 2


def _piece(job: Job, piece: str) -> None:
    if piece == "facts":
        facts(job)
    if piece == "plot":
        plot(job.records.read(LATENCY), (job.records.copies or job.records.folder) / f"{LATENCY}.png")
    if piece not in ("build", "parity", "latency"):
        return
    for name in job.models:
        for batch in job.batches:
            try:
                bench = job.bench(name, batch)
                if bench is not None:
                    _piece_of(job, piece, bench)
            except DeviceLost:
                raise
            except Exception as error:  # fails one model; the others continue
                logging.exception("%s %s batch %s", piece, name, batch)
                job.deadline.left.append(f"{piece} {name} batch {batch}, which failed: {error}")


def _piece_of(job: Job, piece: str, bench: Bench) -> None:
    if piece == "latency":
        latency(job, bench)
        return
    for precision in job.precisions:
        if piece == "build":
            build_bundle(job, bench, precision)
            continue
        for library in job.libraries:
            parity(job, bench, precision, library)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the denoise times of every model and batch as bars; without matplotlib, print the reason."""
    try:
        import matplotlib
    except ImportError as error:
        print(f"no plot: matplotlib cannot be imported ({error})")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["denoise_p50_ms"]:
            groups.setdefault((row["gpu"], row["model"], row["batch"]), []).append(row)
    if not groups:
        print("no plot: no row has a measurement")
        return
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(9, 1 + 0.32 * sum(map(len, groups.values()))),
        squeeze=False,
        layout="constrained",
        height_ratios=[len(group) for group in groups.values()],
    )
    for axis, ((gpu, model, batch), group) in zip(axes[:, 0], groups.items(), strict=True):
        names = [f"{row['row']}, {row['library']} {row['precision']}" for row in group]
        bars = axis.barh(names, [float(row["denoise_p50_ms"]) for row in group])
        axis.bar_label(bars, [f"{float(row['faster_than_eager_20']):.2f}x" for row in group], padding=3)
        axis.invert_yaxis()
        axis.set(title=f"{model}, batch {batch}, {gpu}", xlabel="denoise, ms (median); faster than eager, 20 steps")
        axis.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(path)


def _job(options: argparse.Namespace) -> Job:
    machine = Machine(dry_run=options.dry_run)
    copies = None if options.dry_run else options.output
    folder = (options.output or DRY_OUTPUT) if options.dry_run else RESULTS
    gpu = f"no GPU, {DRY_RUN}" if options.dry_run else machine.description
    compiled = CompileOptions(CompileMode(options.compile_mode), "eager" if options.dry_run else "inductor")
    return Job(
        machine=machine,
        records=Records(folder, gpu, copies, options.commit),
        command=shlex.join(["python", "-m", "benchmarks.speed.gpu", *sys.argv[1:]]),
        work=options.work or (folder / "work" if options.dry_run else WORK),
        models=options.model or (["tiny-dit"] if options.dry_run else DEFAULT_MODELS),
        batches=options.batch or ([1] if options.dry_run else [1, 4]),
        precisions=options.precision,
        libraries=options.library,
        rows=tuple(map(row_named, options.row)),
        skipped=frozenset(map(row_named, options.skip)),
        dtype=options.dtype,
        compiled=compiled,
        row_s=0.2 if options.dry_run else options.row_seconds,
        graph_parity=not options.no_graph_parity,
        again=options.again,
        deadline=Deadline(options.minutes),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--piece", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--model", nargs="+", choices=[*MODELS, *TINY], help=f"by default {', '.join(DEFAULT_MODELS)}")
    parser.add_argument("--batch", nargs="+", type=int, help="pictures at once, by default 1 and 4")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="precision of the engines; fp8 keeps attention in FP16",
    )
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    rows = f"names or short names: {', '.join(SLUGS)}"
    parser.add_argument("--row", nargs="+", default=[], help=f"measure only these rows, in this order; {rows}")
    parser.add_argument("--skip", nargs="+", default=[], help="do not measure these rows")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="dtype of the rows of torch")
    parser.add_argument("--compile-mode", choices=list(CompileMode), default=CompileMode.REDUCE_OVERHEAD)
    parser.add_argument("--minutes", type=float, default=9.0, help="end of this call; longer work does not begin")
    parser.add_argument("--row-seconds", type=float, default=20.0, help="time to measure one row with its base line")
    parser.add_argument(
        "--no-graph-parity",
        action="store_true",
        help="build without the reference for single graphs, which takes minutes to compute",
    )
    parser.add_argument("--again", action="store_true", help="measure rows again that the CSV has")
    parser.add_argument("--output", type=Path, help="folder for a copy of every file")
    parser.add_argument("--work", type=Path, help=f"folder for checkpoints and bundles, by default {WORK}")
    parser.add_argument("--commit", default="", help="commit for the rows, on a machine without git")
    parser.add_argument("--dry-run", action="store_true", help="run every piece on the CPU with a tiny model")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
