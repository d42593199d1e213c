"""Three transformers that the product has never heard of, each with its adapter: the proof of the backbone's seam.

`Toy` is one stream of tokens with six modulation rows a block, `FourRows` has four rows and tanh gates, `TwoStreams`
runs the image's and the text's tokens through every block, as Stable Diffusion 3 and FLUX do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.ports import PICTURES, Port, Role
from ilf_trt.contract.spec import Stream
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.backbone import Backbone, State
from ilf_trt.model.backbones import register
from ilf_trt.model.block import unpatchify
from ilf_trt.model.context import Context

WIDTH, HEADS, CLASSES, CHANNELS, SIDE, PATCH = 16, 2, 5, 1, 8, 2
TEXT_TOKENS, TEXT_CHANNELS = 3, 12
SPREAD = 0.3  # of the random weights: large enough that every condition shows in the output


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each (R, N, D) -> (R, N, D)."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def modulate(tokens: Tensor, scale: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """tokens (R, N, D), scale and shift (R, D) -> normed, modulated tokens in float32."""
    shift = shift[:, None] if isinstance(shift, Tensor) else shift
    return F.layer_norm(tokens.float(), (WIDTH,)) * (1 + scale[:, None]) + shift


class Half(nn.Module):
    """One stream's share of a block: attention and feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward_part(self, normed: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.silu(self.up(normed.to(self.up.weight.dtype)))))


class ToyModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Patches in, blocks, head; every block has the same rows, from the time and the condition."""

    rows, streams = 6, 1

    @register_to_config
    def __init__(self, sample_size: int = SIDE, num_layers: int = 4) -> None:
        super().__init__()
        self.pos_embed = PatchEmbed(sample_size, sample_size, PATCH, CHANNELS, WIDTH)
        self.waves, self.time = Timesteps(16, True, 0), TimestepEmbedding(16, WIDTH)
        self.condition = nn.Linear(TEXT_CHANNELS, WIDTH) if self.streams > 1 else nn.Embedding(CLASSES + 1, WIDTH)
        self.modulation = nn.Linear(WIDTH, self.rows * WIDTH)
        self.head_modulation = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({str(stream): Half() for stream in range(self.streams)}) for _ in range(num_layers)
        )
        self.head = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Any) -> Transformer2DModelOutput:
        """The plain model, written without the adapter's blocks, to hold the adapter against."""
        embedding = self.time(self.waves(timestep.float()).to(self.time.linear_1.weight.dtype))
        tokens = self.pos_embed(hidden_states)
        if self.streams == 1:
            embedding = embedding + self.condition(conditions["class_labels"])
        rows = self.modulation(F.silu(embedding)).unflatten(-1, (self.rows, WIDTH)).unbind(1)
        text = None if self.streams == 1 else self.condition(conditions["prompt_embeds"])
        for layer in self.layers:
            if text is not None:
                tokens, text = self._joint(layer, tokens, text, rows)
            else:
                tokens = self._single(layer["0"], tokens, rows)
        normed = modulate(tokens, self.head_modulation(F.silu(embedding)))
        return Transformer2DModelOutput(sample=unpatchify(self.head(normed), (SIDE // PATCH,) * 2, PATCH))

    def _single(self, half: Half, tokens: Tensor, rows: Sequence[Tensor]) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows
        tokens = tokens + gate[:, None] * half.out(attend(*half.qkv(modulate(tokens, scale, shift)).chunk(3, -1)))
        return tokens + gate_ff[:, None] * half.forward_part(modulate(tokens, scale_ff, shift_ff))

    def _joint(self, layer: Any, tokens: Tensor, text: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class FourRowsModel(ToyModel):
    rows = 4

    def _single(self, half: Half, tokens: Tensor, rows: Sequence[Tensor]) -> Tensor:
        scale, gate, scale_ff, gate_ff = rows
        mixed = half.out(attend(*half.qkv(modulate(tokens, scale)).chunk(3, -1)))
        tokens = tokens + gate[:, None].tanh() * mixed
        return tokens + gate_ff[:, None].tanh() * half.forward_part(modulate(tokens, scale_ff))


class TwoStreamsModel(ToyModel):
    rows, streams = 8, 2

    def _joint(self, layer: Any, tokens: Tensor, text: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pairs = [(tokens, layer["0"], rows[:4]), (text, layer["1"], rows[4:])]
        qkv = [half.qkv(modulate(stream, scale)).chunk(3, -1) for stream, half, (scale, *_) in pairs]
        mixed = attend(*(torch.cat(parts, 1) for parts in zip(*qkv, strict=True)))
        sizes = [tokens.shape[1], text.shape[1]]
        streams = []
        for part, (stream, half, (_, gate, scale_ff, gate_ff)) in zip(mixed.split(sizes, 1), pairs, strict=True):
            stream = stream + gate[:, None] * half.out(part)
            streams.append(stream + gate_ff[:, None] * half.forward_part(modulate(stream, scale_ff)))
        return streams[0], streams[1]


class Toy(Backbone):
    kind, model_type, arguments = "toy", ToyModel, ("timestep", "class_labels")
    block_path, linears, head_rows, shares_modulation = "layers", ("0", "1"), 1, True
    modulation_rows = ToyModel.rows

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def latent(self) -> tuple[int, int, int]:
        return CHANNELS, self.model.config.sample_size, self.model.config.sample_size

    @property
    def patch(self) -> int:
        return PATCH

    def check(self) -> None:
        """Every configuration is known."""

    def last_layers(self, block: Any) -> list[nn.Module]:
        return [layer for half in block.values() for layer in (half.out, half.down)]

    def conditioning(self, text_tokens: int) -> Conditioning:
        return Conditioning.of_labels(CLASSES)

    def call(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"class_labels": conditions["class_labels"]}

    @classmethod
    def conditions_of(cls, call: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"class_labels": call["class_labels"]}

    def context(self, call: Mapping[str, Any]) -> Context:
        return Context({"labels": self.model.condition(call["class_labels"])})

    def _embedding(self, times: Tensor, context: Context, batch: int) -> Tensor:
        time = self.model.time
        waves = self.model.waves(times.flatten().float()).to(time.linear_1.weight.dtype)
        embedding = time(waves).unflatten(0, times.shape)
        labels = context.get("labels")
        if labels is not None:
            return cast(Tensor, embedding + labels)
        return cast(Tensor, embedding.expand(*embedding.shape[:-2], batch, WIDTH))

    def modulation(self, blocks: Sequence[nn.Module], times: Tensor, context: Context, batch: int) -> Tensor:
        rows = self.model.modulation(F.silu(self._embedding(times, context, batch)))
        return cast(Tensor, rows.float().unflatten(-1, (1, self.modulation_rows, WIDTH)))

    def head_modulation(self, times: Tensor, context: Context, batch: int) -> Tensor:
        rows = self.model.head_modulation(F.silu(self._embedding(times, context, batch)))
        return cast(Tensor, rows.float().unsqueeze(-2))

    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        half: Any = cast(nn.ModuleDict, block)["0"]
        (tokens,) = state
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows.unbind(1)
        mixed = half.out(attend(*half.qkv(modulate(tokens, scale, shift).to(half.qkv.weight.dtype)).chunk(3, -1)))
        tokens = tokens + (gate[:, None] * mixed).to(tokens.dtype)
        forwarded = half.forward_part(modulate(tokens, scale_ff, shift_ff))
        return (tokens + (gate_ff[:, None] * forwarded).to(tokens.dtype),)

    def head(self, tokens: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        normed = modulate(tokens, rows[:, 0]).to(self.model.head.weight.dtype)
        return unpatchify(self.model.head(normed), grid, PATCH)


class FourRows(Toy):
    kind, model_type, modulation_rows = "four-rows", FourRowsModel, FourRowsModel.rows

    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        half: Any = cast(nn.ModuleDict, block)["0"]
        (tokens,) = state
        scale, gate, scale_ff, gate_ff = rows.unbind(1)
        mixed = half.out(attend(*half.qkv(modulate(tokens, scale).to(half.qkv.weight.dtype)).chunk(3, -1)))
        tokens = tokens + (gate[:, None].tanh() * mixed).to(tokens.dtype)
        forwarded = half.forward_part(modulate(tokens, scale_ff))
        return (tokens + (gate_ff[:, None].tanh() * forwarded).to(tokens.dtype),)


class TwoStreams(Toy):
    kind, model_type, arguments = "two-streams", TwoStreamsModel, ("timestep", "prompt_embeds")
    modulation_rows = TwoStreamsModel.rows

    def conditioning(self, text_tokens: int) -> Conditioning:
        """The mask first, and names of its own: nothing may rely on an order or on a name."""
        mask = Port("caption_is_real", (PICTURES, text_tokens), "float32", Role.MASK)
        return Conditioning((mask, Port("caption", (*mask.shape, TEXT_CHANNELS), "float32", Role.TEXT)), None)

    def call(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": conditions["caption"] * conditions["caption_is_real"][..., None]}

    @classmethod
    def conditions_of(cls, call: Mapping[str, Any]) -> dict[str, Tensor]:
        embeds = call["prompt_embeds"]
        return {"caption": embeds, "caption_is_real": torch.ones(embeds.shape[:2])}

    def context(self, call: Mapping[str, Any]) -> Context:
        if call.get("prompt_embeds") is None:
            raise InvalidRequest("TwoStreams needs prompt_embeds (R, L, channels)")
        layer = self.model.condition
        return Context({"start": layer(call["prompt_embeds"].to(layer.weight.dtype))})

    def side_streams(self, text_tokens: int) -> tuple[Stream, ...]:
        return (Stream("text", (text_tokens,), WIDTH),)

    def starts(self, context: Context) -> tuple[Tensor, ...]:
        return (context["start"],)

    def block(self, block: nn.Module, state: State, rows: Tensor, context: Context) -> State:
        halves: list[Any] = list(cast(nn.ModuleDict, block).values())
        parts = list(zip(state, halves, (rows[:, :4], rows[:, 4:]), strict=True))
        qkv = [
            half.qkv(modulate(tokens, own[:, 0]).to(half.qkv.weight.dtype)).chunk(3, -1) for tokens, half, own in parts
        ]
        mixed = attend(*(torch.cat(each, 1) for each in zip(*qkv, strict=True)))
        tokens_of_image = state[0].shape[1]
        halves_mixed = (mixed[:, :tokens_of_image], mixed[:, tokens_of_image:])
        streams = []
        for part, (tokens, half, own) in zip(halves_mixed, parts, strict=True):
            _, gate, scale_ff, gate_ff = own.unbind(1)
            tokens = tokens + (gate[:, None] * half.out(part)).to(tokens.dtype)
            forwarded = half.forward_part(modulate(tokens, scale_ff))
            streams.append(tokens + (gate_ff[:, None] * forwarded).to(tokens.dtype))
        return tuple(streams)


TOYS: tuple[type[Toy], ...] = (Toy, FourRows, TwoStreams)


@contextmanager
def registered(adapter: type[Backbone]) -> Iterator[None]:
    """The adapter is known for the time of a block."""
    unregister = register(adapter)
    try:
        yield
    finally:
        unregister()


def toy_model(adapter: type[Toy], **options: Any) -> Any:
    """A model with random weights that leave nothing at zero, the same for the same class."""
    model = adapter.model_type(**options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(SPREAD * noise / max(1, parameter.shape[-1]) ** 0.5 * (4 if parameter.ndim == 1 else 1))
    return model.eval()


def conditions(adapter: Backbone, pictures: int) -> dict[str, Any]:
    """Numpy conditions of some pictures, by port."""
    generator = torch.Generator().manual_seed(6)
    return adapter.conditioning(TEXT_TOKENS).example(
        pictures, (SIDE, SIDE), guidance=True, normal=lambda shape: torch.randn(shape, generator=generator).numpy()
    )
