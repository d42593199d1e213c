"""The T5 encoder as one module whose weights need not be there: what graph `text` is exported from."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilf_trt.contract.document import DocumentError, Size, as_type
from ilf_trt.errors import CheckpointError, told

ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True)}
FEWEST_BUCKETS = 4


@dataclass(frozen=True, slots=True)
class T5Shape:
    """The dimensions of an encoder, by the names of transformers' T5Config."""

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Size
    num_heads: Size
    layer_norm_epsilon: float
    relative_attention_num_buckets: Size
    relative_attention_max_distance: Size
    feed_forward_proj: str

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "T5Shape":
        """From a config.json; raises CheckpointError for another model and for an option that is not known."""
        if config.get("model_type") != "t5":
            kind = told(config.get("model_type"))
            raise CheckpointError(f"{where} is a {kind} text encoder, supported is 't5'")
        filled = {"relative_attention_max_distance": 128, "feed_forward_proj": "relu", **config}
        try:
            shape = as_type({name: filled[name] for name in cls.__slots__ if name in filled}, cls)
        except DocumentError as error:
            raise CheckpointError(f"{where}: config.json: {error}; restore it") from error
        if shape.feed_forward_proj not in ACTIVATIONS:
            known, got = ", ".join(ACTIVATIONS), told(shape.feed_forward_proj)
            raise CheckpointError(f"{where} has feed_forward_proj {got}, supported are {known}")
        stored = config.get("dense_act_fn", ACTIVATIONS[shape.feed_forward_proj][0])  # transformers takes this if both
        if stored != ACTIVATIONS[shape.feed_forward_proj][0]:
            raise CheckpointError(
                f"{where} has dense_act_fn {told(stored)} and feed_forward_proj "
                f"{shape.feed_forward_proj!r}, which differ; correct its config.json"
            )
        if not FEWEST_BUCKETS <= shape.relative_attention_num_buckets < 4 * shape.relative_attention_max_distance:
            raise CheckpointError(
                f"{where} has relative_attention_num_buckets {shape.relative_attention_num_buckets} for distances to "
                f"{shape.relative_attention_max_distance}; restore its config.json"
            )
        return shape

    def buckets(self, tokens: int) -> Tensor:
        """(tokens, tokens): the bucket of every distance between two tokens, half of them for those before.

        Source: arXiv 1910.10683, section 2.1: exact for short distances, logarithmic up to the longest.
        """
        places = torch.arange(tokens)
        apart = places[None, :] - places[:, None]
        half = self.relative_attention_num_buckets // 2
        exact, distance = half // 2, apart.abs()
        ratio = (
            torch.log(distance.clamp(min=1).float() / exact)
            / torch.tensor(self.relative_attention_max_distance / exact).log()
        )
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (torch.where(distance < exact, distance, far) + half * (apart > 0)).to(torch.int32)


class T5Encoder(nn.Module):
    """ids (B, L) int32 and mask (B, L), 1 = a token -> text (B, L, D) in float32.

    Parameters bear transformers' names; those of matrix products lie (in, out), as ONNX multiplies.
    """

    def __init__(self, shape: T5Shape, tokens: int) -> None:
        super().__init__()
        self.shared = nn.Embedding(shape.vocab_size, shape.d_model)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(_Block(shape, first=index == 0) for index in range(shape.num_layers))
        self.encoder.final_layer_norm = _Norm(shape)
        self.register_buffer("buckets", torch.zeros(tokens, tokens, dtype=torch.int32), persistent=False)

    def forward(self, ids: Tensor, ids_mask: Tensor) -> Tensor:
        hidden = self.shared(ids)
        blocks: Any = self.encoder.block
        places = blocks[0].layer[0].SelfAttention.relative_attention_bias(self.buckets)  # (L, L, heads)
        hides = (1 - ids_mask) * torch.finfo(torch.float32).min
        bias = places.float().permute(2, 0, 1).unsqueeze(0) + hides[:, None, None]  # (B, heads, L, L)
        for block in blocks:
            hidden = block(hidden, bias)
        final: Any = self.encoder.final_layer_norm
        text: Tensor = final(hidden).float()
        return text


class _Block(nn.Module):
    def __init__(self, shape: T5Shape, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Attend(shape, first=first), _Forward(shape)])

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        attended: Tensor = self.layer[1](self.layer[0](hidden, bias))
        return attended


class _Attend(nn.Module):
    def __init__(self, shape: T5Shape, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = _Attention(shape, first=first)
        self.layer_norm = _Norm(shape)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        mixed: Tensor = hidden + self.SelfAttention(self.layer_norm(hidden), bias)
        return mixed


class _Attention(nn.Module):
    """Scores are not scaled by the head's size; softmax in float32."""

    def __init__(self, shape: T5Shape, *, first: bool) -> None:
        super().__init__()
        self.heads, inner = shape.num_heads, shape.num_heads * shape.d_kv
        self.q, self.k, self.v = (_Product(shape.d_model, inner) for _ in range(3))
        self.o = _Product(inner, shape.d_model)
        if first:
            self.relative_attention_bias = nn.Embedding(shape.relative_attention_num_buckets, shape.num_heads)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            product(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for product in (self.q, self.k, self.v)
        )
        scores = (query @ key.transpose(-1, -2)).float() + bias
        mixed = torch.softmax(scores, dim=-1).to(value.dtype) @ value
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class _Forward(nn.Module):
    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.DenseReluDense = _Dense(shape)
        self.layer_norm = _Norm(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.DenseReluDense(self.layer_norm(hidden))
        return out


class _Dense(nn.Module):
    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.activation, gated = ACTIVATIONS[shape.feed_forward_proj]
        if gated:
            self.wi_0, self.wi_1 = (_Product(shape.d_model, shape.d_ff) for _ in range(2))
        else:
            self.wi = _Product(shape.d_model, shape.d_ff)
        self.wo = _Product(shape.d_ff, shape.d_model)
        self.gated = gated

    def forward(self, hidden: Tensor) -> Tensor:
        inside = _activation(self.wi_0(hidden) if self.gated else self.wi(hidden), self.activation)
        out: Tensor = self.wo(inside * self.wi_1(hidden) if self.gated else inside)
        return out


class _Product(nn.Module):
    """A matrix product without bias, its weight (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight


class _Norm(nn.Module):
    """Root mean square alone, in float32: no mean is taken off, no bias added."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.d_model))
        self.epsilon = shape.layer_norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(self.weight.dtype)


def _activation(hidden: Tensor, name: str) -> Tensor:
    if name == "gelu_new":
        return F.gelu(hidden, approximate="tanh")
    return F.silu(hidden) if name == "silu" else F.relu(hidden)
