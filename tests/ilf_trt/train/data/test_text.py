"""The adapter of the text encoder."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilf_trt.errors import CheckpointError, MissingDependency
from ilf_trt.train.data.text import Text
from tests.small_tokenizer import unigram


class Tokenizer:
    """Words to their lengths, 1 at the end; asked with the options that a real one takes."""

    def __call__(self, captions: list[str], **options: Any) -> SimpleNamespace:
        self.captions, self.options = captions, options
        rows = [[*map(len, caption.split()), 1][: options["max_length"]] for caption in captions]
        padded = [row + [0] * (options["max_length"] - len(row)) for row in rows]
        ids = torch.tensor(padded)
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


class Encoder(nn.Module):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = (ids * attention_mask)[..., None].expand(*ids.shape, 6).float()
        return SimpleNamespace(last_hidden_state=hidden)


def test_captions_are_cleaned_padded_and_embedded() -> None:
    tokenizer = Tokenizer()
    text, mask = Text(tokenizer, Encoder(), tokens=4).encode(["  A Cat ", ""])
    assert tokenizer.captions == ["a cat", ""]
    assert tokenizer.options["truncation"] is True
    assert (text.shape, text[0, :, 0].tolist()) == ((2, 4, 6), [1, 3, 1, 0])
    assert mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ilf-trt\[pipeline\]'"):
        Text.load(str(tmp_path), tokens=4, dtype=torch.float32)


def test_a_real_t5_and_its_tokenizer_are_read_from_a_pipelines_folder(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    words = unigram(["a cat on a mat", "the cat"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    pieces = len(words.encode("a cat").tokens)
    config = transformers.T5Config(vocab_size=len(fast), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    text, mask = Text.load(str(tmp_path), tokens=pieces + 2, dtype=torch.float32).encode(["A cat", ""])
    assert (text.shape, mask.sum(1).tolist()) == ((2, pieces + 2, 16), [pieces, 1])
    assert bool(text.isfinite().all())
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be read: it has no words"):
        Text.load(str(tmp_path / "text_encoder"), tokens=5, dtype=torch.float32)
