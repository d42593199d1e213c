"""The change of every block's output from step to step: plain, with the paper's cache, with feedback (figures 3, 4).

    python -m benchmarks.study.features --training build/study/digits/tuned [--name features-digits]

A change is |f_k - f_(k-1)| / |f_(k-1)| over all tokens and samples, where f is the output of a block at a step. In a
step with feedback, f comes from the second pass if the block has one.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import write_rows
from ilf_trt import ILFModel, load_ilf
from ilf_trt.bench.rivals import CACHED_EVERY, cached_blocks
from ilf_trt.contract.plan import Ratio, Rule, Step, StepPlan, make_plan
from ilf_trt.model.base import base_scheduler
from ilf_trt.model.checkpoint import read_checkpoint
from ilf_trt.model.context import Context
from ilf_trt.model.sampling import scheduler_of

SAMPLES, CLASSES, SEED = 200, 10, 1


class Trace:
    """One trajectory, block by block; the cache is renewed every `every` steps, and 0 means no cache."""

    def __init__(self, model: ILFModel, *, every: int = 0) -> None:
        self.model, self.every = model, every
        blocks = len(model.adapter.blocks)
        first = (blocks - cached_blocks(blocks)) // 2
        self.cached = range(first, first + cached_blocks(blocks)) if every else range(0)
        self.added: dict[int, Tensor] = {}

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, scheduler: Mapping[str, Any], labels: Tensor, noise: Tensor
    ) -> Iterator[list[Tensor]]:
        """noise (B, C, H, W) -> for each step the output (B, N, D) of every block."""
        solver = scheduler_of(scheduler)
        solver.set_timesteps(plan.requested_steps)
        latents = noise * solver.init_noise_sigma
        for index, (step, timestep) in enumerate(zip(plan.steps, solver.timesteps, strict=True)):
            outputs, epsilon = self._step(index, step, latents, labels)
            latents = solver.step(epsilon, timestep, latents).prev_sample
            yield outputs

    def _step(self, index: int, step: Step, latents: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        adapter, loop = self.model.adapter, self.model.loop
        context = adapter.context({"class_labels": labels})
        time, later = (
            torch.full((len(latents),), value) for value in (step.t, step.t_post if step.feedback else step.t)
        )
        tokens, outputs = adapter.embed(latents), []
        for number, block in enumerate(adapter.blocks):
            if number in self.cached and index % self.every:
                tokens = tokens + self.added[number]
            else:
                output = self._run(block, tokens, later if number > loop.end else time, context)
                self.added[number] = output - tokens
                tokens = output
            outputs.append(tokens)
            if number == loop.end and step.feedback:
                tokens = self._second_pass(outputs, time, later, context)
        sample = adapter.head(tokens, adapter.head_modulation(later, context, len(latents)), adapter.grid)
        return outputs, sample[:, : adapter.latent[0]]

    def _second_pass(self, outputs: list[Tensor], time: Tensor, later: Tensor, context: Context) -> Tensor:
        """The loop's second pass; its outputs replace those of the first."""
        loop, feedback = self.model.loop, self.model.feedback
        change = self._run(feedback.block, outputs[-1], time, context)
        tokens = outputs[loop.begin - 1]
        for index, block in enumerate(list(self.model.adapter.blocks)[loop.begin : loop.end + 1]):
            scale = feedback.scales[index : index + 1]
            tokens = self._run(block, tokens, later, context, feedback=(change,), scales=scale)
            outputs[loop.begin + index] = tokens
        return tokens

    def _run(self, block: nn.Module, tokens: Tensor, time: Tensor, context: Context, **feedback: Any) -> Tensor:
        """One block at `time` (B,), tokens (B, N, D) -> (B, N, D)."""
        adapter = self.model.adapter
        modulation = adapter.modulation([block], time, context, len(time))
        (output,) = adapter.run([block], (tokens,), modulation, context, **feedback)
        return output


def changes(name: str, trace: Trace, plan: StepPlan, scheduler: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every step after the first and every block."""
    shape = (SAMPLES, *trace.model.adapter.latent)
    noise = torch.from_numpy(np.random.default_rng(SEED).standard_normal(shape, np.float32))
    labels, before, rows = torch.arange(SAMPLES) % CLASSES, None, []
    for step, outputs in zip(plan.steps, trace.run(plan, scheduler, labels, noise), strict=True):
        for number, now in enumerate(outputs):
            if before is not None:
                change = ((now - before[number]).norm() / before[number].norm()).item()
                rows.append({"run": name, "t": step.t, "block": number, "change": round(change, 5)})
        before = list(outputs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", type=Path, required=True, help="an ILF checkpoint of a model of classes")
    parser.add_argument("--name", default="features-digits")
    options = parser.parse_args()
    model, scheduler = load_ilf(options.training), base_scheduler(read_checkpoint(options.training).base)
    if not model.loop.begin:
        raise SystemExit("the loop begins with the first block; give a training whose loop has a block before it")

    def plan(steps: int, feedback: str) -> StepPlan:
        return make_plan(
            scheduler,
            steps,
            blocks=len(model.adapter.blocks),
            loop=model.loop,
            feedback=feedback,
            rule=Rule.ANNEAL,
            ratio=Ratio.LOOP_TO_MODEL,
        )

    rows = [
        *changes("plain 20", Trace(model), plan(20, "none"), scheduler),
        *changes("plain 10", Trace(model), plan(10, "none"), scheduler),
        *changes("cache 20", Trace(model, every=CACHED_EVERY), plan(20, "none"), scheduler),
        *changes("ILF 10 all", Trace(model), plan(10, "all"), scheduler),
    ]
    print(write_rows(options.name, shlex.join(["python", "-m", "benchmarks.study.features", *sys.argv[1:]]), rows))


if __name__ == "__main__":
    main()
