"""PixArt-alpha and PixArt-Sigma (diffusers' PixArtTransformer2DModel): masked text, one time row for all blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.ports import Port, Role
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.model.backbone import Backbone, PipelineKind, State
from ilf_trt.model.block import adaptive_block, modulate, unpatchify
from ilf_trt.model.context import Context

MASKED = -10000.0
ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
SIDE_WITH_SIZES = 128  # of the latent: PixArtAlphaPipeline gives micro-conditions to those models alone
SIZE_PARTS = 3  # of the width: height, width and aspect ratio of a picture
TEXT, TEXT_BIAS, SIZES = "text_tokens", "text_bias", "sizes"
"""What the context holds: text (R, L, D), its bias (R, 1, 1, L), and the sizes (R, D) that the time embedding adds."""
TEXT_PAIRS = "text_pairs"
"""Keys and values that a block makes of the text, (R, K, 2, L, D)."""

Bins = Mapping[int, Mapping[str, Sequence[float]]]


def _alpha_bins() -> Bins:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha

    return {32: alpha.ASPECT_RATIO_256_BIN, 64: alpha.ASPECT_RATIO_512_BIN, 128: alpha.ASPECT_RATIO_1024_BIN}


def _sigma_bins() -> Bins:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

    return {**_alpha_bins(), 256: sigma.ASPECT_RATIO_2048_BIN}


class PixArt(Backbone):
    """Alpha at 1024 px carries micro-conditions (resolution, aspect ratio), Sigma does not.

    Source: arXiv 2310.00426 and arXiv 2403.04692.
    """

    kind = "pixart"
    model_type = PixArtTransformer2DModel
    former_config: ClassVar = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    arguments = (
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    )
    unsupported = ("cross_attention_kwargs", "attention_mask")
    pipelines = (
        PipelineKind(ALPHA, 120, _alpha_bins, guidance_scale=4.5, clean_captions=True),
        PipelineKind(SIGMA, 300, _sigma_bins, guidance_scale=4.5, clean_captions=True),
    )
    shares_modulation = True

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
        if self.sized and self.width % SIZE_PARTS:
            raise UnsupportedBackbone(
                f"a width of {self.width} has no {SIZE_PARTS} equal parts for the sizes of pictures"
            )

    def contradiction(self, class_name: str) -> str | None:
        if self.sized and class_name == SIGMA:
            return f"the model takes resolution and aspect ratio, {SIGMA} gives neither"
        if class_name == ALPHA and not self.sized and self.model.config.sample_size == SIDE_WITH_SIZES:
            return (
                f"{ALPHA} gives a model of {SIDE_WITH_SIZES} cells resolution and aspect ratio, this one takes neither"
            )
        return None

    def conditioning(self, text_tokens: int) -> Conditioning:
        return Conditioning.of_text(text_tokens, self.text_channels, sized=self.sized)

    def call(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        call: dict[str, Any] = {
            "encoder_hidden_states": conditions["text"],
            "encoder_attention_mask": conditions["text_mask"],
        }
        if self.sized:
            call["added_cond_kwargs"] = {name: conditions[name] for name in ("resolution", "aspect_ratio")}
        return call

    @classmethod
    def conditions_of(cls, call: Mapping[str, Any]) -> dict[str, Tensor]:
        values = {
            "text": call.get("encoder_hidden_states"),
            "text_mask": call.get("encoder_attention_mask"),
            **(call.get("added_cond_kwargs") or {}),
        }
        return {name: value for name, value in values.items() if value is not None}

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
        values = {TEXT: text, TEXT_BIAS: _bias(mask), SIZES: embedded}
        return Context({name: value for name, value in values.items() if value is not None})

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

    def context_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        text = Port(TEXT, (rows, text_tokens, self.width), dtype, Role.CONTEXT)
        bias = Port(TEXT_BIAS, (rows, 1, 1, text_tokens), "float32", Role.CONTEXT)
        return (bias,) if hoist_text else (text, bias)

    def per_block_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        pairs = Port(TEXT_PAIRS, (rows, 2, text_tokens, self.width), dtype, Role.CONTEXT)
        return (pairs,) if hoist_text else ()

    def per_block(self, blocks: Sequence[nn.Module], context: Context) -> dict[str, Tensor]:
        text = context[TEXT]
        pairs = [torch.stack([layer(text) for layer in (b.attn2.to_k, b.attn2.to_v)], dim=1) for b in cast(Any, blocks)]
        return {TEXT_PAIRS: torch.stack(pairs, dim=1)}

    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        text = ("attn2.to_k.", "attn2.to_v.")
        return {name: value for name, value in block.named_parameters() if hoist_text and name.startswith(text)}

    def _embedding(self, times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self.embed_time(self.model.adaln_single.emb, times)
        sizes = context.get(SIZES)
        if sizes is not None:
            return embedding + sizes
        return embedding.expand(*embedding.shape[:-2], batch, embedding.shape[-1])

    def modulation(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self._embedding(times, context, batch)
        return cast(Tensor, self.model.adaln_single.linear(F.silu(embedding)).float().unflatten(-1, (1, 6, -1)))

    def head_modulation(self, times: Tensor, context: Context, batch: int) -> Tensor:
        embedding = self._embedding(times, context, batch).float()
        return embedding.unsqueeze(-2) + cast(Tensor, self.model.scale_shift_table.float())

    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        parts: Any = block
        (tokens,) = state
        rows = rows + parts.scale_shift_table.float()
        if TEXT_PAIRS in context.per_block:
            key, value = context.per_block[TEXT_PAIRS][:, 0].unbind(1)  # each (R, L, D)
        else:
            text = context[TEXT]
            key, value = parts.attn2.to_k(text), parts.attn2.to_v(text)
        bias = context.get(TEXT_BIAS)
        return (adaptive_block(block, (parts.norm1, parts.norm2), tokens, rows, (key, value), bias),)

    def head(self, tokens: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = rows.unsqueeze(2).unbind(1)  # each (R, 1, D)
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
