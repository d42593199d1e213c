"""What ILF needs to know of a diffusion transformer: the seam between the method and one model class."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ilf_trt.contract.ports import Port
from ilf_trt.contract.positions import positions_of
from ilf_trt.contract.spec import Positions
from ilf_trt.errors import InvalidRequest

TEXT_PAIRS = "text_pairs"


@dataclass(frozen=True, slots=True)
class Context:
    """What the pictures of a batch ask for, without the time; R rows.

    `labels` (R,), `sizes` (R, D) added to the time embedding, `text` (R, L, D), `text_bias` (R, 1, 1, L).
    `text_pairs` (R, K, 2, L, D), the keys and values that K blocks make of the text, stands in for `text`.
    """

    labels: Tensor | None = None
    sizes: Tensor | None = None
    text: Tensor | None = None
    text_bias: Tensor | None = None
    text_pairs: Tensor | None = None

    @classmethod
    def from_ports(cls, ports: Mapping[str, Tensor], graph: str) -> "Context":
        """What of the context crosses into `graph`, which holds blocks."""
        return cls(
            text=ports.get("text_tokens"),
            text_bias=ports.get("text_bias"),
            text_pairs=ports.get(f"{TEXT_PAIRS}_{graph}"),
        )

    def at(self, index: int) -> "Context":
        """The context of block `index` of the K."""
        return self if self.text_pairs is None else replace(self, text_pairs=self.text_pairs[:, index : index + 1])

    def port(self, name: str) -> Tensor:
        """The tensor of a context port."""
        tensor = {"text_tokens": self.text, "text_bias": self.text_bias}[name]
        if tensor is None:
            raise InvalidRequest(f"{name} is missing; pass the text and its mask")
        return tensor


class Backbone(ABC):
    """An adapter over one diffusers transformer; it owns no weights."""

    kind: ClassVar[str]
    model_class: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    shares_rows: ClassVar[bool]

    def __init__(self, model: Any) -> None:
        self.model = model
        self.check()

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.model.transformer_blocks
        return blocks

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
    def null(self) -> Mapping[str, Tensor] | None:
        """The arguments of one row that asks for nothing, where the model itself knows them."""
        return None

    @property
    def null_label(self) -> int | None:
        """The class that asks for nothing, of a backbone of classes."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row, of the size that the model was made for."""
        return self.grid_of(self.latent)

    def grid_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Patches in a column and in a row of a latent of shape (…, H, W)."""
        return shape[-2] // self.patch, shape[-1] // self.patch

    @property
    def positions(self) -> Positions:
        """What the position embedding is made by."""
        embedder = self.model.pos_embed
        return Positions(int(embedder.base_size), float(embedder.interpolation_scale))

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding of a grid, (1, N, D); of the model's own it is the one that the model holds."""
        embedder = self.model.pos_embed
        if grid == self.grid:
            return cast(Tensor, embedder.pos_embed)
        made = positions_of(*grid, self.width, base=self.positions.base, scale=self.positions.scale)
        return torch.from_numpy(made).flatten(0, 1).unsqueeze(0).to(embedder.pos_embed.device)

    def last_layers(self, block: Any) -> list[nn.Module]:
        """The last layer of every branch of a block: with all of them at zero the block passes its input on."""
        attentions = [part for part in (block.attn1, block.attn2) if part is not None]
        return [block.ff.net[-1], *(part.to_out[0] for part in attentions)]

    def embed(self, latent: Tensor, positions: Tensor | None = None) -> Tensor:
        """latent (R, C, H, W), positions (1, N, D) or those of its grid -> tokens (R, N, D), positions added."""
        embedder = self.model.pos_embed
        patches = embedder.proj(latent.to(embedder.proj.weight.dtype)).flatten(2).transpose(1, 2)
        places = self.positions_of(self.grid_of(latent.shape)) if positions is None else positions
        return (patches + places).to(patches.dtype)

    def bind(self, values: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's own positional and named arguments after the latent, by name; raises InvalidRequest."""
        if len(values) > len(self.arguments):
            raise InvalidRequest(
                f"{self.model_class} takes {self.arguments} after the latent, got {len(values)} values"
            )
        call = dict(zip(self.arguments, values, strict=False))
        for name, value in named.items():
            if name in call or name not in self.arguments:
                what = "given twice" if name in call else f"not an argument of {self.model_class}"
                raise InvalidRequest(f"{name!r} is {what}; it takes {', '.join(self.arguments)}")
            call[name] = value
        for name in ("attention_mask", "cross_attention_kwargs"):
            if call.pop(name, None) is not None:
                raise InvalidRequest(f"{name!r} is not supported with inner loop feedback; leave it out")
        if call.get("timestep") is None:
            raise InvalidRequest(f"{self.model_class} needs a timestep; pass timestep=…")
        return call

    @abstractmethod
    def check(self) -> None:
        """Raise UnsupportedBackbone for a configuration that the segments do not reproduce."""

    @abstractmethod
    def condition_ports(self, text_tokens: int, *, guidance: bool) -> tuple[Port, ...]:
        """What a caller of the served model passes for each picture."""

    @abstractmethod
    def context_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        """What of the context crosses from `cond` into all graphs that hold blocks."""

    def per_block_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        """What crosses to each block of its own; `hoist_text` makes the text's keys and values once a picture.

        A backbone that takes text defines this and `text_pairs`; without text it raises InvalidRequest.
        """
        if hoist_text:
            raise InvalidRequest(f"{self.model_class} takes no text; leave --hoist-text out")
        return ()

    @abstractmethod
    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        """The parameters of a block, by name, that `cond` uses."""

    def text_pairs(self, blocks: Sequence[nn.Module], context: Context) -> Tensor:
        """Keys and values of the text for each block, (R, K, 2, L, D)."""
        raise NotImplementedError(self.model_class)

    @abstractmethod
    def call(self, conditions: Mapping[str, Tensor], *, guidance: bool) -> dict[str, Any]:
        """Conditions under their port names, B pictures -> the backbone's own arguments, B or 2B rows."""

    @abstractmethod
    def context(self, call: Mapping[str, Any]) -> Context:
        """The backbone's own arguments -> what the blocks and the time embedding need of them."""

    @abstractmethod
    def rows(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        """times (batch,) -> (batch, K, 6, D), or times (T, 1) -> (T, batch, K, 6, D), in float32.

        K is 1 where all blocks share a row, else the number of blocks.
        """

    @abstractmethod
    def head_row(self, times: Tensor, context: Context, batch: int) -> Tensor:
        """times as in `rows` -> shift and scale of the last norm, (…, batch, 2, D), in float32."""

    @abstractmethod
    def block(self, block: nn.Module, tokens: Tensor, row: Tensor, context: Context) -> Tensor:
        """One block: tokens (R, N, D), row (R, 6, D) -> (R, N, D)."""

    @abstractmethod
    def head(self, tokens: Tensor, row: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (R, N, D) of a grid, row (R, 2, D) -> the model's output (R, C_out, H, W)."""

    def run(
        self,
        blocks: Sequence[nn.Module],
        tokens: Tensor,
        rows: Tensor,
        context: Context,
        *,
        feedback: Tensor | None = None,
        scales: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Blocks one after another, `scales[i] * feedback` added to the input of block i (paper Eq. 2 and 3).

        `recompute` runs every block again in the backward pass instead of keeping what is inside of it.
        tokens and feedback (R, N, D), rows (R, K, 6, D), scales (len(blocks),) -> (R, N, D).
        """
        for index, block in enumerate(blocks):
            if feedback is not None and scales is not None:
                tokens = tokens + (feedback * scales[index]).to(tokens.dtype)
            row, here = rows[:, 0 if self.shares_rows else index], context.at(index)
            if recompute:
                tokens = checkpoint(self.block, block, tokens, row, here, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = self.block(block, tokens, row, here)
        return tokens

    def compile(self) -> None:
        """Compile the block once for all blocks of the model: they differ in weights alone."""
        compiled = torch.compile(self.block, dynamic=False)

        def block(block: nn.Module, tokens: Tensor, row: Tensor, context: Context) -> Tensor:
            return compiled(block, tokens, row.contiguous(), context)  # its strides depend on where it was cut from

        setattr(self, "block", block)  # noqa: B010

    def embed_time(self, embedder: Any, times: Tensor) -> Tensor:
        """times of any shape -> (…, D): sinusoids in float32, then the embedder's two layers."""
        waves = embedder.time_proj(times.flatten().float())
        embedded = embedder.timestep_embedder(waves.to(embedder.timestep_embedder.linear_1.weight.dtype))
        return torch.as_tensor(embedded).unflatten(0, times.shape)
