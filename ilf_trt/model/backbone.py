"""The backbone: what ILF needs to know of a diffusion transformer, the seam between the method and one model class.

A new model is one subclass of `Backbone` in one file. Legend: B pictures, R rows of a batch, N tokens of the image,
D width, K blocks, M modulation rows of a block, C, H, W latent channels and sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.ports import Port
from ilf_trt.contract.positions import positions_of
from ilf_trt.contract.spec import Positions, Stream
from ilf_trt.errors import InvalidRequest

from .context import Context

State = tuple[Tensor, ...]
"""The tokens of every stream, the image's first: (R, N, D), and (R, tokens, width) of each side stream."""


@dataclass(frozen=True, slots=True)
class PipelineKind:
    """A class of diffusers pipelines that this backbone is served in.

    `text_tokens` is the length of its text, None without text. `bins` gives the sizes (height, width) in pixels that
    the model was trained on, by the side of its latent and by the ratio height / width. `guidance_scale` and
    `clean_captions` are what a call of the class takes by default.
    """

    class_name: str
    text_tokens: int | None = None
    bins: Callable[[], Mapping[int, Mapping[str, Sequence[float]]]] = dict
    guidance_scale: float = 1.5
    clean_captions: bool = False


class Backbone(ABC):
    """An adapter over one transformer class; it owns no weights.

    | attribute | meaning |
    |---|---|
    | `kind` | the name in checkpoints and bundles |
    | `model_type` | the class, with diffusers' `from_pretrained`, `save_pretrained` and `config` |
    | `former_config` | the options of a config.json that stand for the class too: its name before diffusers 0.28 |
    | `arguments` | what the class takes after the latent, in order |
    | `unsupported` | those of `arguments` that feedback does not serve |
    | `pipelines` | the diffusers pipelines around it |
    | `block_path` | where the list of blocks lies in the model |
    | `linears` | the parts of a block whose Linears run at every pass; FP8 takes those |
    | `modulation_rows`, `head_rows` | M, and the rows of the head |
    | `shares_modulation` | all blocks get the same rows |
    """

    kind: ClassVar[str]
    model_type: ClassVar[type[Any]]
    former_config: ClassVar[Mapping[str, Any]] = {}
    arguments: ClassVar[tuple[str, ...]]
    unsupported: ClassVar[tuple[str, ...]] = ()
    pipelines: ClassVar[tuple[PipelineKind, ...]] = ()
    block_path: ClassVar[str] = "transformer_blocks"
    linears: ClassVar[tuple[str, ...]] = ("attn1", "attn2", "ff")
    modulation_rows: ClassVar[int] = 6
    head_rows: ClassVar[int] = 2
    shares_modulation: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedBackbone for a configuration that the segments do not reproduce."""
        self.model = model
        self.check()

    def contradiction(self, class_name: str) -> str | None:
        """Why a diffusers pipeline of this class cannot be one of the model's; None if its configuration allows it.

        `class_name` is among `pipelines`.
        """
        return None

    @classmethod
    def model_class(cls) -> str:
        """The name of the transformer's class, as it stands in a config.json."""
        return cls.model_type.__name__

    @classmethod
    def is_of(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes this model."""
        former = cls.former_config
        return config.get("_class_name") == cls.model_class() or bool(former and former.items() <= config.items())

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self.block_path))

    @property
    def width(self) -> int:
        return int(self.model.inner_dim)

    @property
    def patch(self) -> int:
        return int(self.model.config.patch_size)

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W) of the latent; the model may predict more channels (a learned variance), which are dropped."""
        side = int(self.model.config.sample_size)
        return int(self.model.config.in_channels), side, side

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row, of the size that the model was trained on."""
        return self.grid_of(self.latent)

    def grid_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Patches in a column and in a row of a latent of shape (…, H, W)."""
        return shape[-2] // self.patch, shape[-1] // self.patch

    @property
    def positions(self) -> Positions:
        """What the position embedding follows from."""
        embedder = self.model.pos_embed
        return Positions(int(embedder.base_size), float(embedder.interpolation_scale))

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding of a grid, (1, N, D); for the model's own grid it is the model's own tensor."""
        embedder = self.model.pos_embed
        if grid == self.grid:
            return cast(Tensor, embedder.pos_embed)
        values = positions_of(*grid, self.width, base=self.positions.base, scale=self.positions.scale)
        return torch.from_numpy(values).flatten(0, 1).unsqueeze(0).to(embedder.pos_embed.device)

    def last_layers(self, block: Any) -> list[nn.Module]:
        """The last layer of every branch of a block: with all of them at zero the block passes its input on."""
        attentions = [part for part in (block.attn1, block.attn2) if part is not None]
        return [block.ff.net[-1], *(part.to_out[0] for part in attentions)]

    def embed(self, latent: Tensor, positions: Tensor | None = None) -> Tensor:
        """latent (R, C, H, W), positions (1, N, D) or those of its grid -> tokens (R, N, D), positions added."""
        embedder = self.model.pos_embed
        patches = embedder.proj(latent.to(embedder.proj.weight.dtype)).flatten(2).transpose(1, 2)
        offsets = self.positions_of(self.grid_of(latent.shape)) if positions is None else positions
        return (patches + offsets).to(patches.dtype)

    def bind(self, values: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's own positional and named arguments after the latent, by name; raises InvalidRequest."""
        name_of_class = self.model_class()
        if len(values) > len(self.arguments):
            raise InvalidRequest(f"{name_of_class} takes {self.arguments} after the latent, got {len(values)} values")
        call = dict(zip(self.arguments, values, strict=False))
        for name, value in named.items():
            if name in call or name not in self.arguments:
                what = "given twice" if name in call else f"not an argument of {name_of_class}"
                raise InvalidRequest(f"{name!r} is {what}; it takes {', '.join(self.arguments)}")
            call[name] = value
        for name in self.unsupported:
            if call.pop(name, None) is not None:
                raise InvalidRequest(f"{name!r} is not supported with inner loop feedback; leave it out")
        if call.get("timestep") is None:
            raise InvalidRequest(f"{name_of_class} needs a timestep; pass timestep=…")
        return call

    @abstractmethod
    def check(self) -> None:
        """Raise UnsupportedBackbone for a configuration that the segments do not reproduce."""

    @abstractmethod
    def conditioning(self, text_tokens: int) -> Conditioning:
        """What a caller gives for each picture; `text_tokens` is the length of a text, for models that take text."""

    @abstractmethod
    def call(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Conditions of R rows under their port names -> the backbone's own arguments."""

    @classmethod
    @abstractmethod
    def conditions_of(cls, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """The backbone's own arguments -> conditions under their port names; raises InvalidRequest.

        The inverse of `call`, for a diffusers pipeline that calls a served model.
        """

    @abstractmethod
    def context(self, call: Mapping[str, Any]) -> Context:
        """The backbone's own arguments -> what the blocks and the time embedding read of them."""

    def context_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        """What of the context crosses from `cond` into all graphs that hold blocks."""
        return ()

    def per_block_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        """What each block has for itself; `hoist_text` computes the text's keys and values once a picture.

        A backbone that takes text defines this and `per_block`; the others raise InvalidRequest for `hoist_text`.
        """
        if hoist_text:
            raise InvalidRequest(f"{self.model_class()} takes no text; leave --hoist-text out")
        return ()

    def per_block(self, blocks: Sequence[nn.Module], context: Context) -> dict[str, Tensor]:
        """The tensors of `per_block_ports` for `blocks`, each (R, K, …)."""
        raise NotImplementedError(self.model_class())

    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        """The parameters of a block, by name, that `cond` uses in its place."""
        return {}

    def side_streams(self, text_tokens: int) -> tuple[Stream, ...]:
        """The streams that run through the blocks with the image's."""
        return ()

    def starts(self, context: Context) -> tuple[Tensor, ...]:
        """The tokens with which each side stream enters the first block, (R, tokens, width)."""
        return ()

    @abstractmethod
    def modulation(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        """times (batch,) -> (batch, K, M, D), or times (T, 1) -> (T, batch, K, M, D), in float32.

        K is 1 if all blocks share the rows, else the number of blocks.
        """

    @abstractmethod
    def head_modulation(self, times: Tensor, context: Context, batch: int) -> Tensor:
        """times as in `modulation` -> the rows of the head, (…, batch, head rows, D), in float32."""

    @abstractmethod
    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        """One block: a state and its modulation rows (R, M, D) -> the next state."""

    @abstractmethod
    def head(self, tokens: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (R, N, D) of a grid, rows (R, head rows, D) -> the model's output (R, C_out, H, W)."""

    def run(
        self,
        blocks: Sequence[nn.Module],
        state: State,
        modulation: Tensor,
        context: Context,
        *,
        feedback: State | None = None,
        scales: Tensor | None = None,
        recompute: bool = False,
    ) -> State:
        """Blocks one after another, `scales[i] * feedback` added to the input of block i (paper Eq. 2 and 3).

        state and feedback: one (R, N, D) a stream; modulation (R, K, M, D); scales (len(blocks),), shared by the
        streams. `recompute` runs every block again in the backward pass instead of keeping what is inside of it.
        """
        for index, block in enumerate(blocks):
            if feedback is not None and scales is not None:
                state = tuple(
                    tokens + (change * scales[index]).to(tokens.dtype)
                    for tokens, change in zip(state, feedback, strict=True)
                )
            rows, own = modulation[:, 0 if self.shares_modulation else index], context.at(index)
            if recompute:
                state = checkpoint(self.block, block, state, rows, own, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self.block(block, state, rows, own)
        return state

    def compile(self) -> None:
        """Compile the block once for all blocks of the model: they differ in weights alone."""
        compiled = torch.compile(self.block, dynamic=False)

        def block(block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
            return compiled(block, state, rows.contiguous(), context)  # its strides depend on where it was cut from

        setattr(self, "block", block)  # noqa: B010

    def embed_time(self, embedder: Any, times: Tensor) -> Tensor:
        """times of any shape -> (…, D): sinusoids in float32, then the embedder's two layers."""
        waves = embedder.time_proj(times.flatten().float())
        embedded = embedder.timestep_embedder(waves.to(embedder.timestep_embedder.linear_1.weight.dtype))
        return torch.as_tensor(embedded).unflatten(0, times.shape)
