"""The five segments of an ILF model as torch modules, inputs and outputs in the order of their ports."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ilf_trt.backbone import Context
from ilf_trt.contract import Graph, ModelSpec, Precision, graphs_of
from ilf_trt.model import ILFModel


def spec_of(
    model: ILFModel,
    *,
    guidance: bool,
    text_tokens: int,
    train_timesteps: int,
    precision: Precision,
    wide_residual: bool = False,
) -> ModelSpec:
    """The dimensions of `model`, as served with or without classifier-free guidance."""
    adapter = model.adapter
    rows = "2B" if guidance else "B"
    return ModelSpec(
        kind=adapter.kind,
        blocks=len(adapter.blocks),
        width=adapter.width,
        tokens=adapter.grid[0] * adapter.grid[1],
        latent=adapter.latent,
        loop=model.loop,
        guidance=guidance,
        shares_rows=adapter.shares_rows,
        train_timesteps=train_timesteps,
        conditions=adapter.condition_ports(text_tokens, guidance=guidance),
        context=adapter.context_ports(rows, text_tokens, precision.dtype),
        wide_residual=wide_residual,
    )


def segments_of(model: ILFModel, spec: ModelSpec, precision: Precision) -> dict[str, "Segment"]:
    """A module for each graph of `spec`, sharing the weights of `model`."""
    blocks, loop = list(model.adapter.blocks), model.loop
    held = {
        "cond": [*blocks, model.feedback.block],
        "pre": blocks[: loop.begin],
        "loop_body": blocks[loop.begin : loop.end + 1],
        "loop_feedback": [model.feedback.block],
        "post": blocks[loop.end + 1 :],
    }
    modules = {module.name: module for module in (Cond, Pre, LoopBody, LoopFeedback, Post)}
    return {
        graph.name: modules[graph.name](model, spec, graph, held[graph.name]) for graph in graphs_of(spec, precision)
    }


class Segment(nn.Module):
    """One graph: tensors in, tensors out, in the order of `graph`'s ports."""

    name: ClassVar[str]

    def __init__(self, model: ILFModel, spec: ModelSpec, graph: Graph, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapter = model.adapter
        self.backbone = model.backbone
        self.spec = spec
        self.graph = graph
        self.blocks = nn.ModuleList(blocks)
        self._names = tuple(port.name for port in graph.inputs)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def run(
        self, tokens: Tensor, ports: dict[str, Tensor], feedback: Tensor | None = None, scales: Tensor | None = None
    ) -> Tensor:
        """The segment's blocks over tokens (R, N, D)."""
        if not self.blocks:
            return tokens
        rows = next(ports[name] for name in ports if name.startswith("modulation") and name != "modulation_head")
        context = Context.from_ports(ports)
        return self.adapter.run(list(self.blocks), tokens, rows, context, feedback=feedback, scales=scales)


class Cond(Segment):
    """Everything that does not depend on the latent, for every time of a plan at once."""

    name = "cond"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ports = self.named(tensors)
        times = ports.pop("times").unsqueeze(1)  # (T, 1)
        call = self.adapter.call(ports, guidance=self.spec.guidance)
        rows = next(value.shape[0] for value in call.values() if isinstance(value, Tensor))
        context = self.adapter.context(call)
        loop, blocks = self.spec.loop, list(self.blocks)
        holders = {
            "modulation": blocks[:1],
            "modulation_pre": blocks[: loop.begin],
            "modulation_loop_body": blocks[loop.begin : loop.end + 1],
            "modulation_loop_feedback": blocks[-1:],
            "modulation_post": blocks[loop.end + 1 : -1],
        }
        outputs: list[Tensor] = []
        for port in self.graph.outputs:
            if port.name in holders:
                outputs.append(self.adapter.rows(holders[port.name], times, context, rows))
            elif port.name == "modulation_head":
                outputs.append(self.adapter.head_row(times, context, rows))
            else:
                outputs.append(context.port(port.name))
        return tuple(outputs)


class Pre(Segment):
    """Patch embedding and the blocks before the loop; doubles the batch for guidance."""

    name = "pre"

    def forward(self, *tensors: Tensor) -> Tensor:
        ports = self.named(tensors)
        tokens = self.adapter.embed(ports["latent"])
        tokens = tokens.float() if self.spec.wide_residual else tokens
        return self.run(torch.cat([tokens, tokens]) if self.spec.guidance else tokens, ports)


class LoopBody(Segment):
    """The loop's blocks; zero scales make it a plain pass."""

    name = "loop_body"

    def forward(self, *tensors: Tensor) -> Tensor:
        ports = self.named(tensors)
        return self.run(ports["hidden"], ports, ports["feedback"], ports["scales"])


class LoopFeedback(Segment):
    """The feedback block."""

    name = "loop_feedback"

    def forward(self, *tensors: Tensor) -> Tensor:
        ports = self.named(tensors)
        return self.run(ports["features"], ports)


class Post(Segment):
    """The blocks after the loop, the head, guidance and the solver's update, the last two in float32."""

    name = "post"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ports = self.named(tensors)
        tokens = self.run(ports["features"], ports)
        output = self.adapter.head(tokens, ports["modulation_head"])[:, : self.spec.latent[0]].float()
        guidance, c_x, c_out, a, b_0, b_1, b_2, _ = ports["coefficients"].unbind()
        latent = ports["latent"]
        if self.spec.guidance:
            conditional, unconditional = output.unflatten(0, (2, latent.shape[0])).unbind()
            output = unconditional + guidance * (conditional - unconditional)
        prediction = c_x * latent + c_out * output
        following = a * latent + b_0 * prediction + b_1 * ports["history_1"] + b_2 * ports["history_2"]
        return following, prediction
