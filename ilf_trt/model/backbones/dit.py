"""DiT (diffusers' DiTTransformer2DModel): class labels, every block with its own time and label embedder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.model.backbone import Backbone, PipelineKind, State
from ilf_trt.model.block import adaptive_block, modulate, unpatchify
from ilf_trt.model.context import Context

LABELS = "class_labels"


class DiT(Backbone):
    """Source: arXiv 2212.09748."""

    kind = "dit"
    model_type = DiTTransformer2DModel
    former_config: ClassVar = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    arguments = ("timestep", LABELS, "cross_attention_kwargs")
    unsupported = ("cross_attention_kwargs",)
    pipelines = (PipelineKind("DiTPipeline", guidance_scale=4.0),)

    @property
    def classes(self) -> int:
        """Number of classes; the next index is the null class of classifier-free guidance."""
        return int(self.model.config.num_embeds_ada_norm)

    def check(self) -> None:
        if self.model.config.dropout:
            raise UnsupportedBackbone(f"dropout {self.model.config.dropout} is not supported; set it to 0")

    def conditioning(self, text_tokens: int) -> Conditioning:
        return Conditioning.of_labels(self.classes)

    def call(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        return {LABELS: conditions[LABELS]}

    @classmethod
    def conditions_of(cls, call: Mapping[str, Any]) -> dict[str, Tensor]:
        return {LABELS: call[LABELS]} if call.get(LABELS) is not None else {}

    def context(self, call: Mapping[str, Any]) -> Context:
        if call.get(LABELS) is None:
            raise InvalidRequest("DiT needs class_labels (R,); the null class is the number of classes")
        return Context({LABELS: call[LABELS]})

    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        return {
            name: value for name, value in block.named_parameters() if name.startswith(("norm1.emb.", "norm1.linear."))
        }

    def modulation(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        return torch.stack([self._rows(cast(Any, block).norm1, times, context) for block in blocks], dim=-3)

    def _rows(self, norm: Any, times: Tensor, context: Context) -> Tensor:
        return cast(
            Tensor, norm.linear(F.silu(self._embedding(norm.emb, times, context))).float().unflatten(-1, (6, -1))
        )

    def _embedding(self, embedder: Any, times: Tensor, context: Context) -> Tensor:
        table = embedder.class_embedder.embedding_table
        return self.embed_time(embedder, times) + cast(Tensor, table(context[LABELS]))

    def head_modulation(self, times: Tensor, context: Context, batch: int) -> Tensor:
        first: Any = self.blocks[0]
        embedding = self._embedding(first.norm1.emb, times, context)
        return cast(Tensor, self.model.proj_out_1(F.silu(embedding)).float().unflatten(-1, (2, -1)))

    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        parts: Any = block
        (tokens,) = state
        return (adaptive_block(block, (parts.norm1.norm, parts.norm3), tokens, rows),)

    def head(self, tokens: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = rows.unsqueeze(2).unbind(1)  # each (R, 1, D)
        normed = modulate(self.model.norm_out, tokens, shift, scale)
        return unpatchify(self.model.proj_out_2(normed.to(self.model.proj_out_2.weight.dtype)), grid, self.patch)


ADAPTER = DiT
