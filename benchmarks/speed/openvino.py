"""OpenVINO against ONNX Runtime on this CPU: the same five graphs behind the same runtime, and diffusers' own graph.

    pip install openvino
    python -m benchmarks.speed.openvino [--turns 9]

No extra of this package has OpenVINO. A child process builds the bundles; the process that measures loads no PyTorch.
A turn runs every row once, and a ratio compares two times of one turn. Both libraries get the same number of threads.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from ilf_trt.errors import MissingDependency
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.verify import difference

SETTLE_S = 0.05
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


class Bench:
    """The rows of one model, batch 1 with guidance; `resources` closes what they load."""

    def __init__(self, name: str, folder: Path, resources: ExitStack) -> None:
        self.name = name
        self.resources = resources
        self.diffusers = folder / f"{name}-diffusers.onnx"
        self.bundle = Bundle.open(folder / f"{name}.ilf")
        self.manifest = self.bundle.manifest
        self.noise = np.random.default_rng(0).standard_normal((1, *self.manifest.spec.latent), np.float32)
        with Pipeline.load(self.bundle.path) as pipeline:
            self.plans = {PLAIN: pipeline.plan(20, feedback="none"), ILF: pipeline.plan(10, feedback="outer:2")}

    def rows(self, precisions: Sequence[str]) -> dict[Row, Run]:
        """Every row of this machine; OpenVINO computes in each of `precisions`."""
        rows: dict[Row, Run] = {}
        cores = usable_cores()
        for threads in dict.fromkeys((cores, *((1,) if self.name in ONE_THREAD else ()))):
            pipelines = {(ONNX_RUNTIME, F32): Pipeline.load(self.bundle.path, threads=threads)}
            pipelines |= {(OPENVINO, precision): self.openvino(threads, precision) for precision in precisions}
            for (library, precision), pipeline in pipelines.items():
                self.resources.enter_context(pipeline)
                for graph, plan in self.plans.items():
                    rows[Row(library, graph, precision, threads)] = self.served(pipeline, plan)
        return rows | {
            Row(OPENVINO, DIFFUSERS, precision, cores): self.own(cores, precision) for precision in precisions
        }

    def openvino(self, threads: int, precision: str) -> Pipeline:
        """The bundle in OpenVINO, behind the runtime's own trajectory."""
        engines = {
            graph.name: OpenVinoEngine(
                graph, self.bundle.path / graph_file(graph.name), threads=threads, precision=precision
            )
            for graph in self.manifest.graphs
        }
        return Pipeline.of(self.bundle, Host(engines, self.manifest, self.bundle.constants()))

    def served(self, pipeline: Pipeline, plan: StepPlan) -> Run:
        label = LABELS[self.name]
        return lambda: pipeline.generate(class_labels=[label], latents=self.noise, plan=plan, decode=False).latents

    def own(self, threads: int, precision: str) -> Run:
        """diffusers' forward as one graph in OpenVINO; the loop over the steps and the solver are in numpy."""
        compiled = import_openvino().Core().compile_model(self.diffusers, CPU, settings_of(threads, precision))
        request, plan = compiled.create_infer_request(), self.plans[PLAIN]
        labels = np.array([LABELS[self.name], self.manifest.spec.conditioning.null])
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


def measure(rows: Mapping[Row, Run], turns: int, least_s: float) -> tuple[dict[Row, list[float]], dict[Row, float]]:
    """Times in ms of each row by turn, and the largest relative difference of its latents from its base line.

    The first run of each row is its warm-up. There are at least `turns` turns, and more until `least_s` have passed.
    """
    latents = {row: run() for row, run in rows.items()}
    differences = {
        row: difference(row.graph, result, latents[row.base_line]).relative for row, result in latents.items()
    }
    times_ms: dict[Row, list[float]] = {row: [] for row in rows}
    begin_s = time.perf_counter()
    turn = 0
    while turn < turns or time.perf_counter() - begin_s < least_s:
        for row, run in rows.items():
            time.sleep(SETTLE_S)
            start_s = time.perf_counter()
            run()
            times_ms[row].append((time.perf_counter() - start_s) * 1000)
        turn += 1
    return times_ms, differences


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
        model = load_ilf(checkpoint)
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
    options = parser.parse_args()
    if options.build:
        build_models(options.build)
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
            with ExitStack() as resources:
                bench = Bench(name, folder, resources)
                measured = measure(bench.rows(precisions_of_cpu()), options.turns, LEAST_S)
            rows += csv_rows(name, bench.plans, *measured)
    assert "torch" not in sys.modules
    for row in rows:
        print(row)
    print(append_rows("openvino", command, rows, key=("device", "model", "library", "graph", "precision", "threads")))


if __name__ == "__main__":
    main()
