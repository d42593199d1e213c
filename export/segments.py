"""The five segments of an ILF model as torch modules, inputs and outputs in the order of their ports."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.func import functional_call

from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.ports import BRANCHES, FEEDBACK, PICTURES, ROWS, Graph, Port, Role
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.model.backbone import Backbone, State
from ilf_trt.model.context import Context
from ilf_trt.model.ilf_model import ILFModel

MODULATION = "modulation"


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
    `hoist_text` computes the keys and values of the text once a picture, in `cond`, instead of in every block.
    """
    adapter = model.adapter
    hoisted = adapter.hoisted_parameters(model.feedback.block, hoist_text=hoist_text)
    rows = ROWS if guidance else PICTURES
    channels, height, width = adapter.latent
    all_sizes = tuple(dict.fromkeys(sizes)) or ((height, width),)
    return ModelSpec(
        kind=adapter.kind,
        block_path=adapter.block_path,
        blocks=len(adapter.blocks),
        width=adapter.width,
        patch=adapter.patch,
        latent=(channels, *all_sizes[0]),
        sizes=all_sizes,
        positions=adapter.positions,
        side_streams=adapter.side_streams(text_tokens),
        modulation_rows=adapter.modulation_rows,
        head_rows=adapter.head_rows,
        loop=model.loop,
        guidance=guidance,
        shares_modulation=adapter.shares_modulation,
        train_timesteps=train_timesteps,
        conditioning=adapter.conditioning(text_tokens),
        context=adapter.context_ports(rows, text_tokens, precision.dtype, hoist_text=hoist_text),
        per_block=adapter.per_block_ports(rows, text_tokens, precision.dtype, hoist_text=hoist_text),
        constants=tuple(
            Port(f"{FEEDBACK}.{name}", tuple(value.shape), precision.array_dtype, Role.WEIGHT)
            for name, value in hoisted.items()
        ),
        wide_residual=wide_residual,
    )


def constants_of(model: ILFModel, spec: ModelSpec) -> dict[str, Tensor]:
    """The feedback block's tensors that `cond` takes as inputs, under their ports' names, in the model's dtype."""
    weights = dict(model.feedback.block.named_parameters())
    return {port.name: weights[port.name.removeprefix(f"{FEEDBACK}.")].detach() for port in spec.constants}


def segments_of(model: ILFModel, spec: ModelSpec, precision: Precision) -> dict[str, "Segment"]:
    """A module for each graph of `spec`, sharing the weights of `model`."""
    blocks, loop, path = list(model.adapter.blocks), model.loop, model.adapter.block_path
    named = {f"{path}.{index}": block for index, block in enumerate(blocks)}
    ranges = {
        "cond": slice(None),
        "pre": slice(loop.begin),
        "loop_body": slice(loop.begin, loop.end + 1),
        "post": slice(loop.end + 1, None),
    }
    of_graph = {graph: dict(list(named.items())[part]) for graph, part in ranges.items()}
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
        self._of_role = {role: [port.name for port in graph.inputs if port.role is role] for role in Role}
        self._paths = {f"blocks.{index}": name for index, name in enumerate(blocks)}

    def name_in_model(self, path: str) -> str:
        """The path of a module of this segment -> its path in the whole model, `transformer_blocks.8.attn1.to_q`."""
        head = ".".join(path.split(".")[:2])
        return self._paths.get(head, head) + path.removeprefix(head)

    def by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def of_role(self, ports: Mapping[str, Tensor], role: Role) -> tuple[Tensor, ...]:
        """The inputs of one role, in the order of their ports."""
        return tuple(ports[name] for name in self._of_role[role])

    def run(
        self, state: State, ports: dict[str, Tensor], feedback: State | None = None, scales: Tensor | None = None
    ) -> State:
        """The segment's blocks over a state and feedback whose image tokens are (R, h, w, D)."""
        if not self.blocks:
            return state
        grid = state[0].shape[1:3]
        (modulation,) = self.of_role(ports, Role.MODULATION)
        context = Context.from_ports(ports, self.spec, self.name)
        feedback = None if feedback is None else _flat(feedback)
        tokens, *side_streams = self.adapter.run(
            list(self.blocks), _flat(state), modulation, context, feedback=feedback, scales=scales
        )
        return (tokens.unflatten(1, grid), *side_streams)


def _flat(state: State) -> State:
    """Image tokens (R, h, w, D) -> (R, N, D)."""
    tokens, *side_streams = state
    return (tokens.flatten(1, 2), *side_streams)


class Cond(Segment):
    """Everything that does not depend on the latent, for every time of a plan at once.

    What it needs of the feedback block comes in through the `constants`.
    """

    name = "cond"

    def __init__(self, model: ILFModel, spec: ModelSpec, graph: Graph, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(model, spec, graph, blocks)
        self.feedback = _Hoisted(model.adapter, model.feedback.block)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ports = self.by_name(tensors)
        times = ports["times"].unsqueeze(1)  # (T, 1)
        call = self.adapter.call(ports)
        rows = ports[self.spec.row_conditions[0].name].shape[0]
        context = self.adapter.context(call)
        blocks = list(self.blocks)
        begin, after = self.spec.loop.begin, self.spec.loop.end + 1
        of_graph = {"pre": blocks[:begin], "loop_body": blocks[begin:after], "post": blocks[after:]}
        constants = {port.name: ports[port.name] for port in self.spec.constants}

        make: dict[str, Callable[[], Tensor]] = {
            "modulation": partial(self.adapter.modulation, blocks[:1], times, context, rows),
            "modulation_head": partial(self.adapter.head_modulation, times, context, rows),
            **{port.name: partial(context.__getitem__, port.name) for port in self.spec.context},
        }
        for graph, part in of_graph.items():
            make[f"modulation_{graph}"] = partial(self.adapter.modulation, part, times, context, rows)
            for port in self.spec.per_block:
                make[f"{port.name}_{graph}"] = partial(self._per_block, port.name, part, context)
        of_feedback = partial(self.feedback.call, constants, times, context, rows)
        make["modulation_loop_feedback"] = partial(of_feedback, MODULATION)
        for port in self.spec.per_block:
            make[f"{port.name}_loop_feedback"] = partial(of_feedback, port.name)
        for index, stream in enumerate(self.spec.side_streams):
            make[stream.port_name("start")] = partial(self._start, index, context)
        return tuple(make[port.name]() for port in self.graph.outputs)

    def _per_block(self, name: str, blocks: Sequence[nn.Module], context: Context) -> Tensor:
        return self.adapter.per_block(blocks, context)[name]

    def _start(self, index: int, context: Context) -> Tensor:
        start = self.adapter.starts(context)[index]
        return start.float() if self.spec.wide_residual else start


class _Hoisted(nn.Module):
    """What `cond` computes for the feedback block, from weights that are given at each call."""

    def __init__(self, adapter: Backbone, block: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.block = block

    def call(self, constants: dict[str, Tensor], times: Tensor, context: Context, rows: int, what: str) -> Tensor:
        dtype = next(self.block.parameters()).dtype
        weights = {f"block.{name.removeprefix(f'{FEEDBACK}.')}": value.to(dtype) for name, value in constants.items()}
        return cast(Tensor, functional_call(self, weights, (times, context, rows, what)))

    def forward(self, times: Tensor, context: Context, rows: int, what: str) -> Tensor:
        if what == MODULATION:
            return self.adapter.modulation([self.block], times, context, rows)
        return self.adapter.per_block([self.block], context)[what]


class Pre(Segment):
    """Patch embedding and the blocks before the loop; a guided picture's tokens go to two rows."""

    name = "pre"

    def forward(self, *tensors: Tensor) -> State | Tensor:
        ports = self.by_name(tensors)
        latent, positions = ports["latent"], ports.get("positions")
        image = self.adapter.embed(latent, None if positions is None else positions.flatten(0, 1).unsqueeze(0))
        image = image.float() if self.spec.wide_residual else image
        image = image.unflatten(1, self.adapter.grid_of(latent.shape))
        if self.spec.guidance:
            image = image.index_select(0, ports["picture"])
        return _outputs(self.run((image, *self.of_role(ports, Role.START)), ports))


class LoopBody(Segment):
    """The loop's blocks; zero scales make it a plain pass."""

    name = "loop_body"

    def forward(self, *tensors: Tensor) -> State | Tensor:
        ports = self.by_name(tensors)
        hidden, feedback = (self.of_role(ports, role) for role in (Role.TOKENS, Role.FEEDBACK))
        return _outputs(self.run(hidden, ports, feedback, ports["scales"]))


class LoopFeedback(Segment):
    """The feedback block."""

    name = "loop_feedback"

    def forward(self, *tensors: Tensor) -> State | Tensor:
        ports = self.by_name(tensors)
        return _outputs(self.run(self.of_role(ports, Role.FEATURES), ports))


class Post(Segment):
    """The blocks after the loop, the head, guidance and the solver's update, the last two in float32."""

    name = "post"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ports = self.by_name(tensors)
        image, *_ = self.run(self.of_role(ports, Role.FEATURES), ports)
        head = self.adapter.head(image.flatten(1, 2), ports["modulation_head"], (image.shape[1], image.shape[2]))
        output = head[:, : self.spec.latent[0]].float()
        guidance, c_x, c_out, a, b_0, b_1, b_2, _ = ports["coefficients"].unbind()
        latent = ports["latent"]
        if self.spec.guidance:
            conditional, unconditional = (output.index_select(0, ports[name]) for name in BRANCHES)
            output = unconditional + guidance * (conditional - unconditional)
        prediction = c_x * latent + c_out * output
        following = a * latent + b_0 * prediction + b_1 * ports["history_1"] + b_2 * ports["history_2"]
        return following, prediction


def _outputs(state: State) -> State | Tensor:
    """One tensor for a model of one stream, as the exporter names a graph's outputs."""
    return state if len(state) > 1 else state[0]
