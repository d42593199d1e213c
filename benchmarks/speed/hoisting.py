"""The gain of hoisting, which computes once a picture instead of at every step: weights and FLOPs of every graph.

    python -m benchmarks.speed.hoisting [--text-gain]

Full-size models without weights (torch's meta device) run at batch 1 with guidance, for ten steps with feedback on the
first two and the last two. torch's counter counts the FLOPs. Weights are those of Linears and convolutions in float16;
each call reads them again, and DiT's equal embedders count once. "in every step" is the same plan through the eager
model, which computes everything at every step. `--text-gain` times a mid-size PixArt in ONNX Runtime instead, with the
text's keys and values computed in every block, and once a picture.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import write_rows
from benchmarks.rivals.full_size_models import LOOP, MODELS, PIXART, make_backbone
from ilf_trt import attach, save_ilf
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import StepPlan, make_plan
from ilf_trt.contract.ports import PICTURES, ROWS, Port
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import BatchRange, ModelSpec, Precision
from ilf_trt.export.segments import Segment, segments_of, spec_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.verify import difference

REPEATS = 9
HOISTED, IN_EVERY_STEP = "all, hoisted", "all, in every step"
GIGA = 1e9
MIB = 1 << 20
BYTES = 2


def rows_of(name: str, *, hoist_text: bool) -> list[Mapping[str, Any]]:
    """A row for each graph, and two for the whole plan: with hoisting, and with everything in every step."""
    text_tokens = MODELS[name]["text_tokens"]
    with torch.device("meta"):
        model = attach(make_backbone(name), LOOP)
    plan = make_plan(DEFAULT_SCHEDULER, 10, blocks=len(model.adapter.blocks), loop=model.loop, feedback="outer:2")
    spec = spec_of(
        model,
        guidance=True,
        text_tokens=text_tokens or 1,
        train_timesteps=1000,
        precision=Precision.FP16,
        hoist_text=hoist_text,
    )
    runs = runs_of(plan)
    shared = {"model": name, "text": "once a picture" if hoist_text else "in every block"}
    sizes = {PICTURES: 1, ROWS: 2, "T": len(plan.times)}
    rows: list[dict[str, Any]] = []
    for graph, segment in segments_of(model, spec, Precision.FP32).items():
        inputs = meta_inputs(segment, sizes)
        gflop, mib = cost(lambda segment=segment, inputs=inputs: segment(*inputs), copies_of(model))
        rows.append(
            {
                **shared,
                "graph": graph,
                "runs": runs[graph],
                "gflop_a_run": round(gflop, 3),
                "weights_mib": round(mib, 1),
                "stored_mib": "",
            }
        )
    after = [sum(row["runs"] * row[key] for row in rows) for key in ("gflop_a_run", "weights_mib")]
    before = cost_before(model, plan, text_tokens)
    totals = {HOISTED: after, IN_EVERY_STEP: before}
    return rows + [
        {
            **shared,
            "graph": graph,
            "runs": 1,
            "gflop_a_run": round(gflop, 1),
            "weights_mib": round(mib, 1),
            "stored_mib": round(stored_mib(model, frozenset() if graph == IN_EVERY_STEP else copies_of(model)), 1),
        }
        for graph, (gflop, mib) in totals.items()
    ]


def runs_of(plan: StepPlan) -> dict[str, int]:
    """How often a plan runs each graph."""
    steps, with_feedback = len(plan.steps), sum(step.feedback for step in plan.steps)
    second_passes = {"loop_body": steps + with_feedback, "loop_feedback": with_feedback}
    return {"cond": 1, "pre": steps, **second_passes, "post": steps}


def linear_flop(model: ILFModel, spec: ModelSpec, plan: StepPlan, pictures: int) -> float:
    """Operations of the Linears in all graph runs of a plan, two a multiply-add; `model` is on the meta device."""
    runs, total = runs_of(plan), 0.0
    sizes = {PICTURES: pictures, ROWS: 2 * pictures, "T": len(plan.times)}
    for graph, segment in segments_of(model, spec, Precision.FP32).items():
        with torch.no_grad(), LinearCounter() as counter:
            segment(*meta_inputs(segment, sizes))
        total += runs[graph] * counter.flop
    return total


def meta_inputs(segment: Segment, sizes: Mapping[str, int]) -> list[Tensor]:
    """A tensor without values for each input of a segment."""
    return [meta_tensor(port, sizes) for port in segment.graph.inputs]


def meta_tensor(port: Port, sizes: Mapping[str, int]) -> Tensor:
    """A tensor without values, of the shape of a port."""
    dtype = torch.int64 if port.dtype.startswith("int") else torch.float32
    return torch.zeros(port.resolve(sizes), dtype=dtype, device="meta")


def cost_before(model: ILFModel, plan: StepPlan, text_tokens: int) -> tuple[float, float]:
    """The cost of a plan through the eager model, which computes everything at every step."""
    adapter = model.adapter
    latents = torch.zeros(2, *adapter.latent, device="meta")
    time, later = (torch.zeros(2, device="meta") for _ in range(2))
    ports = adapter.conditioning(text_tokens).row_ports(ROWS)
    call = adapter.call({port.name: meta_tensor(port, {ROWS: 2}) for port in ports})

    def step_cost(feedback: bool) -> tuple[float, float]:
        return cost(lambda: model(latents, timestep=time, t_post=later, feedback=feedback, **call), frozenset())

    costs = {feedback: step_cost(feedback) for feedback in (True, False)}
    steps = [costs[step.feedback] for step in plan.steps]
    return sum(gflop for gflop, _ in steps), sum(mib for _, mib in steps)


def stored_mib(model: ILFModel, copies: frozenset[int]) -> float:
    """MiB of all parameters of base and feedback block, without `copies`."""
    return sum(value.numel() for value in model.parameters() if id(value) not in copies) * BYTES / MIB


def copies_of(model: ILFModel) -> frozenset[int]:
    """Ids of the embedders' weights in all blocks but the first; a converted DiT has equal copies there."""
    path, blocks = model.adapter.block_path, len(model.adapter.blocks)
    copies = tuple(f"{path}.{index}.norm1.emb." for index in range(1, blocks))
    return frozenset(id(value) for name, value in model.backbone.named_parameters() if name.startswith(copies))


def cost(work: Callable[[], Any], copies: frozenset[int]) -> tuple[float, float]:
    """GFLOP of `work`, two operations a multiply-add, and MiB of the weights that it reads, without `copies`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, WeightCounter(copies) as weights:
        work()
    return counter.get_total_flops() / GIGA, weights.elements * BYTES / MIB


class WeightCounter(TorchFunctionMode):
    """Counts the elements of the weights of Linears and convolutions, once a call."""

    def __init__(self, copies: frozenset[int]) -> None:
        super().__init__()
        self.copies = copies
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, torch.conv2d) and id(args[1]) not in self.copies:
            self.elements += args[1].numel()
        return func(*args, **(kwargs or {}))


class LinearCounter(TorchFunctionMode):
    """Counts the operations of Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.flop += 2.0 * args[0].numel() * args[1].shape[0]
        return func(*args, **(kwargs or {}))


def text_gain() -> list[Mapping[str, Any]]:
    """The speed of a mid-size PixArt in ONNX Runtime with the text's keys and values once a picture, as ratios."""
    torch.manual_seed(0)
    config = {
        **PIXART,
        "num_layers": 12,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "cross_attention_dim": 384,
    }
    config |= {"sample_size": 32, "caption_channels": 256}
    rng = np.random.default_rng(0)
    rows: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = attach(PixArtTransformer2DModel(**config), (3, 7))
        save_ilf(model, Path(folder) / "checkpoint")
        for text_tokens in (120, 300):
            pipelines = []
            for hoist_text in (False, True):
                options = BuildOptions(
                    batch=BatchRange(1, 1, 1), text_tokens=text_tokens, hoist_text=hoist_text, verify=False
                )
                output = Path(folder) / f"{text_tokens}-{hoist_text}.ilf"
                pipelines.append(Pipeline.load(build(str(Path(folder) / "checkpoint"), output, options).bundle.path))
            texts: dict[str, Any] = {
                f"{prefix}text": rng.standard_normal((1, text_tokens, 256), np.float32) for prefix in ("", "negative_")
            }
            results = [pipeline.generate(**texts) for pipeline in pipelines]
            relative = difference("latents", results[1].latents, results[0].latents).relative
            ratios = []
            for _ in range(REPEATS):
                ms = [pipeline.generate(**texts).timings.total_ms for pipeline in pipelines]
                ratios.append(ms[0] / ms[1])
            low, middle, high = (round(float(np.quantile(ratios, q)), 3) for q in (0, 0.5, 1))
            rows.append(
                {
                    "model": "pixart-12x384, 256 tokens",
                    "text_tokens": text_tokens,
                    "faster_hoisted": middle,
                    "faster_min": low,
                    "faster_max": high,
                    "repeats": REPEATS,
                    "relative_difference": f"{relative:.1e}",
                }
            )
            for pipeline in pipelines:
                pipeline.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-gain", action="store_true", help="time a PixArt instead of counting operations")
    options = parser.parse_args()
    if options.text_gain:
        print(write_rows("hoisting-text", "python -m benchmarks.speed.hoisting --text-gain", text_gain()))
        return
    rows = [
        row
        for name, facts in MODELS.items()
        for hoist_text in ((False, True) if facts["text_tokens"] else (False,))
        for row in rows_of(name, hoist_text=hoist_text)
    ]
    print(write_rows("hoisting", "python -m benchmarks.speed.hoisting", rows))


if __name__ == "__main__":
    main()
