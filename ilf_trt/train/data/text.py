"""The text encoder that embeds captions: transformers' T5 with its own tokenizer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ilf_trt.errors import MissingDependency
from ilf_trt.model.foreign import load_whole, refuse_foreign_code

from .folder import load_pretrained

FEWEST_PIECES = 2  # without a tokenizer's files, transformers makes a tokenizer of a single piece


class Text:
    """captions -> text embeddings and their mask. Lower-cases and strips captions, as PixArt's pipeline does."""

    def __init__(self, tokenizer: Any, model: Any, *, tokens: int, device: str = "cpu") -> None:
        self.tokenizer, self.model = tokenizer, model.to(device).eval()
        self.tokens, self.device = tokens, device

    @classmethod
    def load(cls, source: str, *, tokens: int, dtype: torch.dtype, device: str = "cpu") -> "Text":
        """From a folder or a hub id, of the encoder or of a pipeline; raises InvalidRequest, MissingDependency."""
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise MissingDependency(f"embedding text needs {error.name}; pip install 'ilf-trt[prepare]'") from error

        def load_model(options: dict[str, str]) -> Any:
            return load_whole(
                partial(T5EncoderModel.from_pretrained, source, use_safetensors=True, dtype=dtype, **options), source
            )

        def load_tokenizer(options: dict[str, str]) -> Any:
            refuse_foreign_code(Path(source) / options.get("subfolder", ""))
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
            if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < FEWEST_PIECES:
                raise ValueError("its tokenizer has no words; copy its tokenizer.json or spiece.model there")
            return tokenizer

        tokenizer = load_pretrained("tokenizer", source, "tokenizer", load_tokenizer, (ImportError,))
        model = load_pretrained("text encoder", source, "text_encoder", load_model, (SafetensorError,))
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
