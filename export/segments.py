"""The five segments of an ILF model as torch modules, inputs and outputs in the order of their ports."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.ports import BLOCKS, BRANCHES, FEEDBACK, PICTURES, ROWS, Graph, Port
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.model.backbone import TEXT_PAIRS, Backbone, Context
from ilf_trt.model.ilf_model import ILFModel


def spec_of(
    model: ILFModel,
    *,
    guidance: bool,
    text_tokens: int,
    train_timesteps: int,
    precision: Precision,
    wide_residual: bool = False,
    hoist_text: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
) -> ModelSpec:
    """The dimensions of `model`, as served with or without classifier-free guidance.

    `sizes` are latents' (H, W), the first of them the default; without any, the model's own.
    `hoist_text` makes the keys and values of the text once a picture, in `cond`, instead of in every block.
    """
    adapter = model.adapter
    hoisted = adapter.hoisted_parameters(model.feedback.block, hoist_text=hoist_text)
    rows = ROWS if guidance else PICTURES
    channels, height, width = adapter.latent
    made = tuple(dict.fromkeys(sizes)) or ((height, width),)
    return ModelSpec(
        kind=adapter.kind,
        blocks=len(adapter.blocks),
        width=adapter.width,
        patch=adapter.patch,
        latent=(channels, *made[0]),
        sizes=made,
        positions=adapter.positions,
        loop=model.loop,
        guidance=guidance,
        shares_rows=adapter.shares_rows,
        train_timesteps=train_timesteps,
        conditions=adapter.condition_ports(text_tokens, guidance=guidance),
        null=adapter.null_label,
        context=adapter.context_ports(rows, text_tokens, precision.dtype, hoist_text=hoist_text),
        per_block=adapter.per_block_ports(rows, text_tokens, precision.dtype, hoist_text=hoist_text),
        constants=tuple(
            Port(f"{FEEDBACK}.{name}", tuple(value.shape), precision.array_dtype) for name, value in hoisted.items()
        ),
        wide_residual=wide_residual,
    )


def constants_of(model: ILFModel, spec: ModelSpec) -> dict[str, Tensor]:
    """The feedback block's tensors that `cond` takes as inputs, under their ports' names, in the model's dtype."""
    weights = dict(model.feedback.block.named_parameters())
    return {port.name: weights[port.name.removeprefix(f"{FEEDBACK}.")].detach() for port in spec.constants}


def segments_of(model: ILFModel, spec: ModelSpec, precision: Precision) -> dict[str, "Segment"]:
    """A module for each graph of `spec`, sharing the weights of `model`."""
    blocks, loop = list(model.adapter.blocks), model.loop
    named = {f"{BLOCKS}.{index}": block for index, block in enumerate(blocks)}
    held = {
        "cond": slice(None),
        "pre": slice(loop.begin),
        "loop_body": slice(loop.begin, loop.end + 1),
        "post": slice(loop.end + 1, None),
    }
    of_graph = {graph: dict(list(named.items())[few]) for graph, few in held.items()}
    of_graph["loop_feedback"] = {FEEDBACK: model.feedback.block}
    modules = {module.name: module for module in (Cond, Pre, LoopBody, LoopFeedback, Post)}
    return {
        graph.name: modules[graph.name](model, spec, graph, of_graph[graph.name])
        for graph in graphs_of(spec, precision)
    }


class Segment(nn.Module):
    """One graph: tensors in, tensors out, in the order of `graph`'s ports."""

    name: ClassVar[str]

    def __init__(self, model: ILFModel, spec: ModelSpec, graph: Graph, blocks: Mapping[str, nn.Module]) -> None:
        """`blocks` under their names in the whole model."""
        super().__init__()
        self.adapter = model.adapter
        self.backbone = model.backbone
        self.spec = spec
        self.graph = graph
        self.blocks = nn.ModuleList(blocks.values())
        self._names = tuple(port.name for port in graph.inputs)
        self._places = {f"blocks.{index}": name for index, name in enumerate(blocks)}

    def name_in_model(self, path: str) -> str:
        """The path of a module of this segment -> its path in the whole model, `transformer_blocks.8.attn1.to_q`."""
        place = ".".join(path.split(".")[:2])
        return self._places.get(place, place) + path.removeprefix(place)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def run(
        self, tokens: Tensor, ports: dict[str, Tensor], feedback: Tensor | None = None, scales: Tensor | None = None
    ) -> Tensor:
        """The segment's blocks over tokens and feedback (R, h, w, D)."""
        if not self.blocks:
            return tokens
        grid = tokens.shape[1:3]
        rows = next(ports[name] for name in ports if name.startswith("modulation") and name != "modulation_head")
        context = Context.from_ports(ports, self.name)
        fed_back = None if feedback is None else feedback.flatten(1, 2)
        made = self.adapter.run(
            list(self.blocks), tokens.flatten(1, 2), rows, context, feedback=fed_back, scales=scales
        )
        return made.unflatten(1, grid)


class Cond(Segment):
    """Everything that does not depend on the latent, for every time of a plan at once.

    What it needs of the feedback block comes in through the `constants`.
    """

    name = "cond"

    def __init__(self, model: ILFModel, spec: ModelSpec, graph: Graph, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(model, spec, graph, blocks)
        self.feedback = _Hoisted(model.adapter, model.feedback.block)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ports = self.named(tensors)
        times = ports["times"].unsqueeze(1)  # (T, 1)
        call = self.adapter.call(ports, guidance=False)
        rows = next(value.shape[0] for value in call.values() if isinstance(value, Tensor))
        context = self.adapter.context(call)
        blocks = list(self.blocks)
        begin, after = self.spec.loop.begin, self.spec.loop.end + 1
        held = {"pre": blocks[:begin], "loop_body": blocks[begin:after], "post": blocks[after:]}
        constants = {port.name: ports[port.name] for port in self.spec.constants}

        make: dict[str, Callable[[], Tensor]] = {
            "modulation": partial(self.adapter.rows, blocks[:1], times, context, rows),
            "modulation_head": partial(self.adapter.head_row, times, context, rows),
            **{port.name: partial(context.port, port.name) for port in self.spec.context},
        }
        for graph, few in held.items():
            make[f"modulation_{graph}"] = partial(self.adapter.rows, few, times, context, rows)
            make[f"{TEXT_PAIRS}_{graph}"] = partial(self.adapter.text_pairs, few, context)
        of_feedback = partial(self.feedback.call, constants, times, context, rows)
        make["modulation_loop_feedback"] = partial(of_feedback, "rows")
        make[f"{TEXT_PAIRS}_loop_feedback"] = partial(of_feedback, TEXT_PAIRS)
        return tuple(make[port.name]() for port in self.graph.outputs)


class _Hoisted(nn.Module):
    """What `cond` makes for the feedback block, from weights that are given at each call."""

    def __init__(self, adapter: Backbone, block: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.block = block

    def call(self, constants: dict[str, Tensor], times: Tensor, context: Context, rows: int, what: str) -> Tensor:
        dtype = next(self.block.parameters()).dtype
        weights = {f"block.{name.removeprefix(f'{FEEDBACK}.')}": value.to(dtype) for name, value in constants.items()}
        made: Tensor = functional_call(self, weights, (times, context, rows, what))
        return made

    def forward(self, times: Tensor, context: Context, rows: int, what: str) -> Tensor:
        if what == TEXT_PAIRS:
            return self.adapter.text_pairs([self.block], context)
        return self.adapter.rows([self.block], times, context, rows)


class Pre(Segment):
    """Patch embedding and the blocks before the loop; a guided picture's tokens go to two rows."""

    name = "pre"

    def forward(self, *tensors: Tensor) -> Tensor:
        ports = self.named(tensors)
        latent, places = ports["latent"], ports.get("positions")
        tokens = self.adapter.embed(latent, None if places is None else places.flatten(0, 1).unsqueeze(0))
        tokens = tokens.float() if self.spec.wide_residual else tokens
        tokens = tokens.unflatten(1, self.adapter.grid_of(latent.shape))
        return self.run(tokens.index_select(0, ports["picture"]) if self.spec.guidance else tokens, ports)


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
        head = self.adapter.head(tokens.flatten(1, 2), ports["modulation_head"], (tokens.shape[1], tokens.shape[2]))
        output = head[:, : self.spec.latent[0]].float()
        guidance, c_x, c_out, a, b_0, b_1, b_2, _ = ports["coefficients"].unbind()
        latent = ports["latent"]
        if self.spec.guidance:
            conditional, unconditional = (output.index_select(0, ports[name]) for name in BRANCHES)
            output = unconditional + guidance * (conditional - unconditional)
        prediction = c_x * latent + c_out * output
        following = a * latent + b_0 * prediction + b_1 * ports["history_1"] + b_2 * ports["history_2"]
        return following, prediction
