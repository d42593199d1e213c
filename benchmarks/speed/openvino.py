"""OpenVINO against ONNX Runtime on this CPU: the same five graphs behind the same runtime, and diffusers' own graph.

    pip install openvino
    python -m benchmarks.speed.openvino [--turns 9]

No extra of this package has OpenVINO. A child process builds the bundles. Each library, precision and number of threads
runs in a process of its own without PyTorch, so that no thread pool disturbs another. A turn runs every row once, and a
ratio compares two times of one turn.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import append_rows
from benchmarks.rivals.openvino_engine import CPU, OpenVinoEngine, import_openvino, settings_of
from ilf_trt.bench.environment import usable_cores, versions
from ilf_trt.bench.statistics import ratio_interval
from ilf_trt.contract.bundle import Bundle, graph_file
from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import BenchmarkFailed, MissingDependency
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.verify import difference

SETTLE_S = 0.05
READY = "ready"
LEAST_S = 15.0
ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"
PLAIN, ILF = "plain", "ILF"
F32, BF16 = "f32", "bf16"
DIFFUSERS = "diffusers' own graph"
LABELS = {"demo": 3, "dit-12x384": 207}
ONE_THREAD = ("demo",)
"""Models so small that one thread may be faster than all."""

Run = Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Row:
    """What runs: `graph` is the five graphs under a plan, or diffusers' own."""

    library: str
    graph: str
    precision: str
    threads: int

    @property
    def base_line(self) -> "Row":
        """ONNX Runtime with the same steps and as many threads."""
        return Row(ONNX_RUNTIME, ILF if self.graph == ILF else PLAIN, F32, self.threads)


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that loads one library for a model and runs its rows on demand."""

    model: str
    folder: Path
    library: str
    precision: str
    threads: int

    @property
    def rows(self) -> dict[str, Row]:
        """By graph; one thread runs no graph of diffusers."""
        graphs = [PLAIN, ILF]
        if self.library == OPENVINO and self.threads == usable_cores():
            graphs.append(DIFFUSERS)
        return {graph: Row(self.library, graph, self.precision, self.threads) for graph in graphs}

    def latents(self, graph: str) -> Path:
        """Where the process leaves the latents of its warm-up."""
        name = "-".join((self.model, self.library, graph.split()[0], self.precision, str(self.threads)))
        return self.folder / f"{name}.npy"

    def serve(self) -> None:
        """Run in the process: each line of stdin names a graph; answer with the milliseconds that it took."""
        bench = Bench(self)
        runs = {graph: bench.run_of(graph) for graph in self.rows}
        for graph, run in runs.items():
            np.save(self.latents(graph), run())
        if "torch" in sys.modules:
            raise SystemExit("PyTorch is loaded in the process that measures")
        print(READY, flush=True)
        for line in sys.stdin:
            run = runs[line.rstrip("\n")]
            time.sleep(SETTLE_S)
            start_s = time.perf_counter()
            run()
            print((time.perf_counter() - start_s) * 1000, flush=True)

    @contextmanager
    def started(self) -> Iterator[Callable[[str], float]]:
        """A call that runs a graph in the process and gives its time in ms; raises BenchmarkFailed if it ends early."""
        command = [sys.executable, "-m", "benchmarks.speed.openvino", "--serve", self.model, str(self.folder)]
        command += [self.library, self.precision, str(self.threads)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            stdin, stdout = process.stdin, process.stdout

            def answer() -> str:
                if not (line := stdout.readline()):
                    raise BenchmarkFailed(f"{self.library} on {self.model} ended; its reason stands above")
                return line

            def ask(graph: str) -> float:
                print(graph, file=stdin, flush=True)
                return float(answer())

            if answer().strip() != READY:
                raise BenchmarkFailed(f"{self.library} on {self.model} did not start")
            yield ask


class Bench:
    """The runs of a worker, batch 1 with guidance."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.bundle = Bundle.open(worker.folder / f"{worker.model}.ilf")
        self.manifest = self.bundle.manifest
        self.noise = np.random.default_rng(0).standard_normal((1, *self.manifest.spec.latent), np.float32)
        if worker.library == OPENVINO:
            self.pipeline = self.openvino()
        else:
            self.pipeline = Pipeline.load(self.bundle.path, threads=worker.threads)
        self.plans = plans_of(self.pipeline)

    def run_of(self, graph: str) -> Run:
        if graph == DIFFUSERS:
            return self.own()
        label, plan = LABELS[self.worker.model], self.plans[graph]
        request: dict[str, Any] = {"class_labels": [label], "latents": self.noise, "plan": plan, "decode": False}
        return lambda: self.pipeline.generate(**request).latents

    def openvino(self) -> Pipeline:
        """The bundle in OpenVINO, behind the runtime's own trajectory."""
        options: dict[str, Any] = {"threads": self.worker.threads, "precision": self.worker.precision}
        engines = {
            graph.name: OpenVinoEngine(graph, self.bundle.path / graph_file(graph.name), **options)
            for graph in self.manifest.graphs
        }
        return Pipeline.of(self.bundle, Host(engines, self.manifest, self.bundle.constants()))

    def own(self) -> Run:
        """diffusers' forward as one graph in OpenVINO; the loop over the steps and the solver are in numpy."""
        worker, plan = self.worker, self.plans[PLAIN]
        path = worker.folder / f"{worker.model}-diffusers.onnx"
        compiled = import_openvino().Core().compile_model(path, CPU, settings_of(worker.threads, worker.precision))
        request = compiled.create_infer_request()
        labels = np.array([LABELS[worker.model], self.manifest.spec.conditioning.null])
        channels, scale = self.manifest.spec.latent[0], np.float32(self.manifest.guidance_scale)

        def run() -> NDArray[np.float32]:
            latent = self.noise * np.float32(plan.initial_scale)
            history = [np.zeros_like(latent)] * 3
            for step in plan.steps:
                c_x, c_out, a, b_0, b_1, b_2 = (np.float32(value) for value in step.solver)
                rows = {"latent": np.concatenate([latent, latent]), "times": np.full(2, step.t, np.float32)}
                output = request.infer(rows | {"labels": labels}, share_inputs=True, share_outputs=True)[0]
                conditional, unconditional = output[:, :channels]
                guided = unconditional + scale * (conditional - unconditional)
                history = [c_x * latent + c_out * guided[None], *history[:2]]
                latent = a * latent + b_0 * history[0] + b_1 * history[1] + b_2 * history[2]
            return latent

        return run


def plans_of(pipeline: Pipeline) -> dict[str, StepPlan]:
    return {PLAIN: pipeline.plan(20, feedback="none"), ILF: pipeline.plan(10, feedback="outer:2")}


def workers_of(model: str, folder: Path, precisions: Sequence[str]) -> list[Worker]:
    """The processes of a model on this machine; OpenVINO computes in each of `precisions`."""
    counts = dict.fromkeys((usable_cores(), *((1,) if model in ONE_THREAD else ())))
    sides = [(ONNX_RUNTIME, F32), *((OPENVINO, precision) for precision in precisions)]
    return [Worker(model, folder, *side, threads) for threads in counts for side in sides]


def take_turns(rows: Mapping[Row, Callable[[], float]], turns: int, least_s: float) -> dict[Row, list[float]]:
    """Times in ms of each row by turn: at least `turns` turns, and more until `least_s` have passed."""
    times_ms: dict[Row, list[float]] = {row: [] for row in rows}
    begin_s = time.perf_counter()
    turn = 0
    while turn < turns or time.perf_counter() - begin_s < least_s:
        for row, run in rows.items():
            times_ms[row].append(run())
        turn += 1
    return times_ms


def relative_differences(latents: Mapping[Row, NDArray[np.float32]]) -> dict[Row, float]:
    """The largest relative difference of each row's latents from those of its base line."""
    return {row: difference(row.graph, own, latents[row.base_line]).relative for row, own in latents.items()}


def measure(model: str, folder: Path, precisions: Sequence[str], turns: int) -> Iterator[dict[str, Any]]:
    """The rows of a model for the CSV; the first run of each row is its warm-up."""
    with ExitStack() as stack:
        rows: dict[Row, Callable[[], float]] = {}
        latents: dict[Row, NDArray[np.float32]] = {}
        for worker in workers_of(model, folder, precisions):
            ask = stack.enter_context(worker.started())
            for graph, row in worker.rows.items():
                rows[row] = partial(ask, graph)
                latents[row] = np.load(worker.latents(graph))
        times_ms = take_turns(rows, turns, LEAST_S)
    with Pipeline.load(folder / f"{model}.ilf") as pipeline:
        plans = plans_of(pipeline)
    return csv_rows(model, plans, times_ms, relative_differences(latents))


def csv_rows(
    model: str, plans: Mapping[str, StepPlan], times_ms: Mapping[Row, list[float]], differences: Mapping[Row, float]
) -> Iterator[dict[str, Any]]:
    """The rows of a model for the CSV."""
    found = versions(("onnxruntime", "openvino"))
    for row, times in times_ms.items():
        plan = plans.get(row.graph, plans[PLAIN])
        faster = ratio_interval(times_ms[row.base_line], times)
        yield {
            "model": model,
            "library": row.library,
            "library_version": found[row.library.lower().replace(" ", "")],
            "graph": row.graph,
            "precision": row.precision,
            "threads": row.threads,
            "steps": len(plan.steps),
            "block_forwards": plan.block_forwards,
            "batch": 1,
            "warm_ups": 1,
            "n": len(times),
            "median_ms": round(float(np.median(times)), 3),
            "min_ms": round(min(times), 3),
            "max_ms": round(max(times), 3),
            "faster_than_onnxruntime": round(faster.median, 3),
            "faster_low": round(faster.low, 3),
            "faster_high": round(faster.high, 3),
            "relative_difference": f"{differences[row]:.1e}",
        }


def precisions_of_cpu() -> list[str]:
    """float32, and bfloat16 if OpenVINO has instructions for it on this CPU."""
    capabilities = import_openvino().Core().get_property(CPU, "OPTIMIZATION_CAPABILITIES")
    return [F32, *([BF16] if "BF16" in capabilities else [])]


def build_models(folder: Path) -> None:
    """Write the bundle of each model into `folder`, and diffusers' own graph."""
    import torch

    from benchmarks.speed.cpu import Model, middle_checkpoint
    from ilf_trt import load_ilf
    from ilf_trt.bench.diffusers_graph import OPSET, Plain

    checkpoints = {"demo": "demo", "dit-12x384": middle_checkpoint(folder)}
    for name, checkpoint in checkpoints.items():
        Model.built(name, checkpoint, folder, LABELS[name])
        model = load_ilf(checkpoint).eval()
        example = (torch.zeros(2, *model.adapter.latent), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        with torch.no_grad():
            program: Any = torch.onnx.export(
                Plain(model.backbone),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=["latent", "times", "labels"],
                verbose=False,
            )
        program.save(folder / f"{name}-diffusers.onnx")


@contextmanager
def built() -> Iterator[Path]:
    """A folder with the models, which a process of its own has built."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.speed.openvino", "--build", folder], check=True)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build_models(options.build)
        return
    if options.serve:
        model, folder_name, library, precision, threads = options.serve
        Worker(model, Path(folder_name), library, precision, int(threads)).serve()
        return
    try:
        import_openvino()
    except MissingDependency as error:
        raise SystemExit(str(error)) from error
    command = f"python -m benchmarks.speed.openvino --turns {options.turns}"
    if options.models != list(LABELS):
        command += f" --models {' '.join(options.models)}"
    rows: list[dict[str, Any]] = []
    with built() as folder:
        for name in options.models:
            rows += measure(name, folder, precisions_of_cpu(), options.turns)
    for row in rows:
        print(row)
    print(append_rows("openvino", command, rows, key=("device", "model", "library", "graph", "precision", "threads")))


if __name__ == "__main__":
    main()
