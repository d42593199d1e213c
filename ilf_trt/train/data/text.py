"""The text encoder that embeds captions: transformers' T5 with its own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ilf_trt.model.t5_folder import TOKENIZER_FILES, TRANSFORMERS, load_t5, load_tokenizer

from .folder import part_folder


class Text:
    """captions -> text embeddings and their mask. Lower-cases and strips captions, as PixArt's pipeline does."""

    def __init__(self, tokenizer: Any, model: Any, *, tokens: int, device: str = "cpu") -> None:
        self.tokenizer, self.model = tokenizer, model.to(device).eval()
        self.tokens, self.device = tokens, device

    @classmethod
    def load(cls, source: str, *, tokens: int, dtype: torch.dtype, device: str = "cpu") -> "Text":
        """From a folder or a hub id, of the encoder or of a pipeline; raises CheckpointError, MissingDependency."""
        weights = (f"{TRANSFORMERS}*.safetensors", f"{TRANSFORMERS}*.json")
        tokenizer = load_tokenizer(part_folder("tokenizer", source, "tokenizer", TOKENIZER_FILES))
        model = load_t5(part_folder("text encoder", source, "text_encoder", weights), dtype)
        return cls(tokenizer, model, tokens=tokens, device=device)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> text (B, L, text channels) and mask (B, L), 1 = a token, on the CPU; cuts at L tokens."""
        encoding = self.tokenizer(
            [caption.lower().strip() for caption in captions],
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        mask = encoding.attention_mask
        text = self.model(encoding.input_ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        return text.cpu(), mask
