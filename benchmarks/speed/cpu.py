"""Latency on a CPU, as ratios in one run: eager diffusers, eager ILF, ONNX Runtime unsplit, split, and ILF.

    python -m benchmarks.speed.cpu [--repeats 7]

Two models: the demo, and a random DiT of 12 blocks, width 384 and 256 tokens. Each repeat runs every row once, so that
a drift of the machine affects all rows; a ratio compares two times of one repeat. Each row also has the quality.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.record import append_rows
from benchmarks.rivals.unsplit import export_unsplit, opened
from benchmarks.study.judge import DigitsJudge
from benchmarks.study.served_quality import BATCH, SHOWN, sample
from ilf_trt import attach, load_ilf, save_ilf
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.spec import BatchRange
from ilf_trt.model import sampling
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.trajectory import RunOptions
from ilf_trt.runtime.verify import difference

ONE = BatchRange(1, 1, 1)
LOOP = (3, 7)
SETTLE_S = 0.05
BASE_LINE = "eager diffusers"
IMPORTS = "import time; t = time.perf_counter(); import ilf_trt.runtime; print(time.perf_counter() - t)"
SERVING = (
    "import re, sys; from ilf_trt.runtime import Pipeline; "
    "p = Pipeline.load(sys.argv[1]); p.generate(class_labels=[3]); "
    "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)"
)

Run = Callable[[], NDArray[np.float32]]


class Plain(nn.Module):
    """The plain diffusers backbone, for an export without this package."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, latent: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return self.backbone(latent, timestep=times, class_labels=labels).sample


class Bench:
    """The rows of one model, batch 1 with guidance; `resources` closes what they load."""

    def __init__(self, name: str, checkpoint: str, folder: Path, label: int, resources: ExitStack) -> None:
        self.name = name
        self.label = label
        self.folder = folder
        self.resources = resources
        self.model = load_ilf(checkpoint)
        built = build(checkpoint, folder / f"{name}.ilf", BuildOptions(batch=ONE, guidance_scale=4.0))
        self.pipeline = resources.enter_context(Pipeline.load(built.bundle.path))
        self.path = built.bundle.path
        self.manifest = built.bundle.manifest
        self.noise = np.random.default_rng(0).standard_normal((1, *self.manifest.spec.latent), np.float32)
        self.plain = self.pipeline.plan(20, feedback="none")
        self.with_feedback = self.pipeline.plan(10, feedback="outer:2")

    def rows(self) -> dict[str, tuple[StepPlan, Run]]:
        equal = self.pipeline.plan(self.with_feedback.block_forwards // self.with_feedback.blocks, feedback="none")
        return {
            BASE_LINE: (self.plain, self.eager(self.model.backbone, self.plain)),
            "eager diffusers at equal cost": (equal, self.eager(self.model.backbone, equal)),
            "eager ILF": (self.with_feedback, self.eager(self.model, self.with_feedback)),
            "ONNX Runtime, diffusers' own graph": (self.plain, self.diffusers_graph()),
            "ONNX Runtime, one graph": (self.plain, self.unsplit()),
            "ilf-trt plain": (self.plain, self.served(self.plain)),
            "ilf-trt plain at equal cost": (equal, self.served(equal)),
            "ilf-trt ILF": (self.with_feedback, self.served(self.with_feedback)),
        }

    def served(self, plan: StepPlan) -> Run:
        return lambda: self.pipeline.generate(class_labels=[self.label], latents=self.noise, plan=plan).latents

    def eager(self, model: nn.Module, plan: StepPlan) -> Run:
        labels = {"class_labels": torch.tensor([self.label], dtype=torch.int32)}
        scheduler, scale = self.manifest.scheduler, self.manifest.guidance_scale
        noise = torch.from_numpy(self.noise)
        return lambda: sampling.sample(model, plan, scheduler, labels, noise, guidance_scale=scale).numpy()

    def diffusers_graph(self) -> Run:
        """diffusers' forward as one graph; the loop over the steps and the solver are in numpy."""
        path = self.folder / f"{self.name}-diffusers.onnx"
        rows = (2, *self.manifest.spec.latent)
        example = (torch.zeros(rows), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        names = ["latent", "times", "labels"]
        with torch.no_grad():
            program: Any = torch.onnx.export(
                Plain(self.model.backbone), example, dynamo=True, opset_version=20, input_names=names, verbose=False
            )
        program.save(path)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        labels = np.array([self.label, self.manifest.spec.conditioning.null])
        channels, scale = self.manifest.spec.latent[0], np.float32(self.manifest.guidance_scale)

        def run() -> NDArray[np.float32]:
            latent = self.noise * np.float32(self.plain.initial_scale)
            history = [np.zeros_like(latent)] * 3
            for step in self.plain.steps:
                c_x, c_out, a, b_0, b_1, b_2 = (np.float32(value) for value in step.solver)
                inputs = {
                    "latent": np.concatenate([latent, latent]),
                    "times": np.full(2, step.t, np.float32),
                    "labels": labels,
                }
                conditional, unconditional = session.run(None, inputs)[0][:, :channels]
                output = unconditional + scale * (conditional - unconditional)
                history = [c_x * latent + c_out * output[None], *history[:2]]
                latent = a * latent + b_0 * history[0] + b_1 * history[1] + b_2 * history[2]
            return latent

        return run

    def unsplit(self) -> Run:
        """One graph for a whole step, bound to memory once, as the runtime binds its graphs."""
        spec, path = self.manifest.spec, self.folder / f"{self.name}-unsplit.onnx"
        export_unsplit(self.model, self.manifest, path)
        trajectory = self.resources.enter_context(
            opened(self.pipeline.bundle, self.plain, 1, path, device="cpu", library=None)
        )
        labels = {"class_labels": np.array([self.label], np.int32)}
        rows = spec.conditioning.rows(labels, guided=spec.guidance)
        return lambda: trajectory.run(self.noise, rows, self.manifest.guidance_scale, RunOptions())[0]

    def measure(self, repeats: int, quality: Mapping[StepPlan, Mapping[str, float]]) -> list[dict[str, Any]]:
        rows = self.rows()
        references = {plan: self.eager(self.model, plan)() for plan, _ in rows.values()}
        errors = {name: difference(name, run(), references[plan]).relative for name, (plan, run) in rows.items()}
        times_ms: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(repeats):
            for name, (_, run) in rows.items():
                time.sleep(SETTLE_S)
                start_s = time.perf_counter()
                run()
                times_ms[name].append((time.perf_counter() - start_s) * 1000)
        base, one_graph = np.array(times_ms[BASE_LINE]), np.array(times_ms["ONNX Runtime, one graph"])
        result = []
        for name, (plan, _) in rows.items():
            values = np.array(times_ms[name])
            result.append(
                {
                    "model": self.name,
                    "row": name,
                    "steps": len(plan.steps),
                    "block_forwards": plan.block_forwards,
                    "batch": 1,
                    "warm_ups": 1,
                    "n": repeats,
                    "median_ms": round(float(np.median(values)), 2),
                    "min_ms": round(float(values.min()), 2),
                    "max_ms": round(float(values.max()), 2),
                    "faster_than_eager_20": round(float(np.median(base / values)), 3),
                    "faster_min": round(float((base / values).min()), 3),
                    "faster_max": round(float((base / values).max()), 3),
                    "cost_against_one_graph": round(float(np.median(values / one_graph)), 4),
                    "relative_difference": f"{errors[name]:.1e}",
                    "frechet": quality.get(plan, {}).get("frechet", ""),
                    "accuracy": quality.get(plan, {}).get("accuracy", ""),
                }
            )
            print(result[-1], flush=True)
        return result

    def overhead_us(self, repeats: int) -> float:
        """The median Python time of a step, without its engines."""
        runs = [
            self.pipeline.generate(class_labels=[self.label], latents=self.noise, plan=self.with_feedback).timings
            for _ in range(repeats * 5)
        ]
        return float(np.median([timings.overhead_us_per_step for timings in runs]))


def demo_quality(folder: Path) -> dict[StepPlan, dict[str, float]]:
    """Distance and accuracy of the demo under the timed plans, for one noise seed and without guidance."""
    judge = DigitsJudge()
    built = build("demo", folder / "quality.ilf", BuildOptions(batch=BatchRange(1, BATCH, BATCH), guidance=False))
    with Pipeline.load(built.bundle.path) as pipeline:
        plans = [pipeline.plan(20, feedback="none"), pipeline.plan(12, feedback="none"), pipeline.plan(10)]
        return {
            plan: {
                key: round(value, 4)
                for key, value in judge.judge(sample(pipeline, plan, judge.labels, 1, 1.0)).items()
                if key in SHOWN
            }
            for plan in plans
        }


def middle_checkpoint(folder: Path) -> str:
    """A checkpoint of a random DiT of 12 blocks, width 384 and 256 tokens, with feedback scales of 0.05."""
    torch.manual_seed(0)
    backbone = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
    )
    model = attach(backbone, LOOP)
    with torch.no_grad():
        model.feedback.scales.fill_(0.05)
    save_ilf(model, folder / "middle")
    return str(folder / "middle")


def process_facts(bundle: Path, repeats: int) -> dict[str, float]:
    """Import time and peak memory of a process that only serves."""

    def run(code: str, *arguments: str) -> float:
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return float(json.loads(process.stdout))

    return {
        "import_s": round(float(np.median([run(IMPORTS) for _ in range(repeats)])), 3),
        "serving_peak_mib": round(float(np.median([run(SERVING, str(bundle)) for _ in range(3)])), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--process-only", action="store_true", help="import time, memory and overhead, no latency")
    options = parser.parse_args()
    command = f"python -m benchmarks.speed.cpu --repeats {options.repeats}" + " --process-only" * options.process_only
    with tempfile.TemporaryDirectory() as name, ExitStack() as resources:
        folder = Path(name)
        demo = Bench("demo", "demo", folder, 3, resources)
        middle = Bench("dit-12x384", middle_checkpoint(folder), folder, 207, resources)
        if not options.process_only:
            rows = demo.measure(options.repeats, demo_quality(folder)) + middle.measure(options.repeats, {})
            print(append_rows("cpu-latency", command, rows, key=("device", "model", "row")))
        facts = [
            {"model": bench.name, "overhead_us_per_step": round(bench.overhead_us(options.repeats), 1)}
            | process_facts(bench.path, options.repeats)
            for bench in (demo, middle)
        ]
        for fact in facts:
            print(fact)
        print(append_rows("cpu-process", command, facts, key=("device", "model")))


if __name__ == "__main__":
    main()
