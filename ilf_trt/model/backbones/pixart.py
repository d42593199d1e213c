"""PixArt-alpha and PixArt-Sigma (diffusers' PixArtTransformer2DModel): masked text, one time row for all blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ilf_trt.contract.ports import Port
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.model.backbone import TEXT_PAIRS, Backbone, Context
from ilf_trt.model.block import adaptive_block, modulate, unpatchify

MASKED = -10000.0


class PixArt(Backbone):
    """Alpha at 1024 px carries micro-conditions (resolution, aspect ratio), Sigma does not.

    Source: arXiv 2310.00426 and arXiv 2403.04692.
    """

    kind = "pixart"
    model_class = PixArtTransformer2DModel.__name__
    arguments = (
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    )
    shares_rows = True

    @property
    def text_channels(self) -> int:
        config = self.model.config
        return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)

    @property
    def sized(self) -> bool:
        """Whether the model takes micro-conditions."""
        return bool(self.model.use_additional_conditions)

    def check(self) -> None:
        config = self.model.config
        for option, wanted in (("dropout", 0.0), ("attention_type", "default")):
            if config[option] != wanted:
                raise UnsupportedBackbone(f"{option} {config[option]!r} is not supported; it must be {wanted!r}")

    def condition_ports(self, text_tokens: int, *, guidance: bool) -> tuple[Port, ...]:
        text = [
            port
            for prefix in (("", "negative_") if guidance else ("",))
            for port in (
                Port(f"{prefix}text", ("B", text_tokens, self.text_channels), "float32"),
                Port(f"{prefix}text_mask", ("B", text_tokens), "float32"),
            )
        ]
        sizes = [Port("resolution", ("B", 2), "float32"), Port("aspect_ratio", ("B", 1), "float32")]
        return (*text, *(sizes if self.sized else ()))

    def context_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        text = Port("text_tokens", (rows, text_tokens, self.width), dtype)
        bias = Port("text_bias", (rows, 1, 1, text_tokens), "float32")
        return (bias,) if hoist_text else (text, bias)

    def per_block_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        return (Port(TEXT_PAIRS, (rows, 2, text_tokens, self.width), dtype),) if hoist_text else ()

    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        text = ("attn2.to_k.", "attn2.to_v.")
        return {name: value for name, value in block.named_parameters() if hoist_text and name.startswith(text)}

    def text_pairs(self, blocks: Sequence[nn.Module], context: Context) -> Tensor:
        text = context.port("text_tokens")
        pairs = [torch.stack([layer(text) for layer in (b.attn2.to_k, b.attn2.to_v)], dim=1) for b in cast(Any, blocks)]
        return torch.stack(pairs, dim=1)

    def call(self, conditions: Mapping[str, Tensor], *, guidance: bool) -> dict[str, Any]:
        branches = ("", "negative_") if guidance else ("",)

        def stacked(name: str) -> Tensor:
            return torch.cat([conditions[prefix + name] for prefix in branches])

        call: dict[str, Any] = {
            "encoder_hidden_states": stacked("text"),
            "encoder_attention_mask": stacked("text_mask"),
        }
        if self.sized:
            repeats = len(branches)
            call["added_cond_kwargs"] = {
                name: torch.cat([conditions[name]] * repeats) for name in ("resolution", "aspect_ratio")
            }
        return call

    def context(self, call: Mapping[str, Any]) -> Context:
        text, mask, sizes = (
            call.get(name) for name in ("encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs")
        )
        if text is None:
            raise InvalidRequest("PixArt needs encoder_hidden_states (R, L, text channels)")
        if self.sized and sizes is None:
            raise InvalidRequest("this PixArt needs added_cond_kwargs with resolution (R, 2) and aspect_ratio (R, 1)")
        projection = self.model.caption_projection
        if projection is not None:
            text = projection(text.to(projection.linear_1.weight.dtype))
        embedded = self._sizes(sizes) if self.sized and sizes is not None else None
        return Context(sizes=embedded, text=text, text_bias=_bias(mask))

    def _sizes(self, sizes: Mapping[str, Tensor]) -> Tensor:
        embedder = self.model.adaln_single.emb
        parts = []
        for name, layers in (
            ("resolution", embedder.resolution_embedder),
            ("aspect_ratio", embedder.aspect_ratio_embedder),
        ):
            values = sizes[name]  # (R, 2) and (R, 1)
            waves = embedder.additional_condition_proj(values.flatten().float())
            parts.append(layers(waves.to(layers.linear_1.weight.dtype)).unflatten(0, values.shape).flatten(1))
        return torch.cat(parts, dim=1)

    def _embedding(self, times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self.embed_time(self.model.adaln_single.emb, times)
        if context.sizes is not None:
            return embedding + context.sizes
        return embedding.expand(*embedding.shape[:-2], batch, embedding.shape[-1])

    def rows(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self._embedding(times, context, batch)
        return cast(Tensor, self.model.adaln_single.linear(F.silu(embedding)).float().unflatten(-1, (1, 6, -1)))

    def head_row(self, times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self._embedding(times, context, batch).float()
        return embedding.unsqueeze(-2) + cast(Tensor, self.model.scale_shift_table.float())

    def block(self, block: nn.Module, tokens: Tensor, row: Tensor, context: Context) -> Tensor:
        parts: Any = block
        row = row + parts.scale_shift_table.float()
        if context.text_pairs is not None:
            key, value = context.text_pairs[:, 0].unbind(1)  # each (R, L, D)
        else:
            text = context.port("text_tokens")
            key, value = parts.attn2.to_k(text), parts.attn2.to_v(text)
        return adaptive_block(block, (parts.norm1, parts.norm2), tokens, row, (key, value), context.text_bias)

    def head(self, tokens: Tensor, row: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = row.unsqueeze(2).unbind(1)  # each (R, 1, D)
        normed = modulate(self.model.norm_out, tokens, shift, scale)
        return unpatchify(self.model.proj_out(normed.to(self.model.proj_out.weight.dtype)), grid, self.patch)


def _bias(mask: Tensor | None) -> Tensor | None:
    """A mask (R, L), 1 = keep, or a bias (R, 1, L) -> (R, 1, 1, L) in float32."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return ((1 - mask.float()) * MASKED)[:, None, None]
    return mask.float().unsqueeze(1)


ADAPTER = PixArt
