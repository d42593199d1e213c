"""A small tokenizer with T5's conventions, for tests that have no torch too."""

from collections.abc import Iterable
from typing import Any

import pytest

PIECES = 120


def unigram(sentences: Iterable[str]) -> Any:
    """A Unigram tokenizer with the pipeline of T5, trained on `sentences`; skips where there is no tokenizers."""
    pytest.importorskip("tokenizers", reason="tokens need the tokenizers library")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
