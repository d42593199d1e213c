"""DiT (diffusers' DiTTransformer2DModel): class labels, every block with its own time and label embedder."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ilf_trt.contract.ports import Port
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.model.backbone import Backbone, Context
from ilf_trt.model.block import adaptive_block, modulate, unpatchify


class DiT(Backbone):
    """Source: arXiv 2212.09748."""

    kind = "dit"
    model_class = DiTTransformer2DModel.__name__
    arguments = ("timestep", "class_labels", "cross_attention_kwargs")
    shares_rows = False

    @property
    def classes(self) -> int:
        """Number of classes; the next index is the null class of classifier-free guidance."""
        return int(self.model.config.num_embeds_ada_norm)

    @property
    def null_label(self) -> int:
        return self.classes

    @property
    def null(self) -> Mapping[str, Tensor]:
        return {"class_labels": torch.tensor([self.classes])}

    def check(self) -> None:
        if self.model.config.dropout:
            raise UnsupportedBackbone(f"dropout {self.model.config.dropout} is not supported; set it to 0")

    def condition_ports(self, text_tokens: int, *, guidance: bool) -> tuple[Port, ...]:
        return (Port("class_labels", ("B",), "int32", below=self.classes + 1),)

    def context_ports(self, rows: str, text_tokens: int, dtype: str, *, hoist_text: bool) -> tuple[Port, ...]:
        return ()

    def hoisted_parameters(self, block: nn.Module, *, hoist_text: bool) -> dict[str, nn.Parameter]:
        return {
            name: value for name, value in block.named_parameters() if name.startswith(("norm1.emb.", "norm1.linear."))
        }

    def call(self, conditions: Mapping[str, Tensor], *, guidance: bool) -> dict[str, Any]:
        labels = conditions["class_labels"]
        return {"class_labels": torch.cat([labels, torch.full_like(labels, self.classes)]) if guidance else labels}

    def context(self, call: Mapping[str, Any]) -> Context:
        if call.get("class_labels") is None:
            raise InvalidRequest("DiT needs class_labels (R,); the null class is the number of classes")
        return Context(labels=call["class_labels"])

    def rows(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        return torch.stack([self._row(cast(Any, block).norm1, times, context) for block in blocks], dim=-3)

    def _row(self, norm: Any, times: Tensor, context: Context) -> Tensor:
        return cast(
            Tensor, norm.linear(F.silu(self._embedding(norm.emb, times, context))).float().unflatten(-1, (6, -1))
        )

    def _embedding(self, embedder: Any, times: Tensor, context: Context) -> Tensor:
        return self.embed_time(embedder, times) + cast(Tensor, embedder.class_embedder.embedding_table(context.labels))

    def head_row(self, times: Tensor, context: Context, batch: int) -> Tensor:
        first: Any = self.blocks[0]
        embedding = self._embedding(first.norm1.emb, times, context)
        return cast(Tensor, self.model.proj_out_1(F.silu(embedding)).float().unflatten(-1, (2, -1)))

    def block(self, block: nn.Module, tokens: Tensor, row: Tensor, context: Context) -> Tensor:
        parts: Any = block
        return adaptive_block(block, (parts.norm1.norm, parts.norm3), tokens, row)

    def head(self, tokens: Tensor, row: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = row.unsqueeze(2).unbind(1)  # each (R, 1, D)
        normed = modulate(self.model.norm_out, tokens, shift, scale)
        return unpatchify(self.model.proj_out_2(normed.to(self.model.proj_out_2.weight.dtype)), grid, self.patch)


ADAPTER = DiT
