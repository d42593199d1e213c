"""The training of the text-to-image demo: a small PixArt on emoji, its T5 text encoder, and its feedback block.

    python -m benchmarks.emoji.training --pictures FOLDER --output build/emoji

`benchmarks/emoji/data.py` describes FOLDER. The command writes an ILF checkpoint that is also a PixArtAlphaPipeline
without a VAE: its latents are pixels. A second call resumes a stopped training. The checkpoint holds the running mean
of the weights of base and text encoder, in half precision; the feedback block is trained on that mean.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from benchmarks.emoji.data import SIDE, Emoji, read, texts
from benchmarks.study.base_training import Course, train_base
from ilf_trt.model.base import BASE_FOLDER, base_scheduler, load_backbone
from ilf_trt.model.checkpoint import fingerprint, load_ilf, save_ilf
from ilf_trt.model.surgery import attach
from ilf_trt.train.batch_stream import Batch, MemoryStream
from ilf_trt.train.checkpoints import Base
from ilf_trt.train.loop import RunSetup, facts_of, train
from ilf_trt.train.losses import add_noise
from ilf_trt.train.recipe import Recipe

WIDTH, HEAD_WIDTH, BLOCKS, PATCH = 96, 32, 12, 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_TOKENS, PIECES = 96, 2, 16, 1000
BATCH = 64
WARMUP = 300
MEAN_HALF_LIFE = 300  # iterations of the weights' running mean
NULL_SHARE = 0.1
MAX_SNR = 5.0  # of the weight of a time in the loss (min-SNR, arXiv 2303.09556)
SAVE_EVERY = 250
DRAWINGS = 8  # captions of every picture that the feedback block sees


class TextToImage(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, transformer: Any, encoder: Any) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder

    def forward(self, x_t: Tensor, time_: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """x_t (B, 3, H, W), time (B,), ids and mask (B, L) -> the predicted noise."""
        text = self.encoder(ids, attention_mask=mask).last_hidden_state
        predicted: Tensor = self.transformer(
            x_t, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=time_, return_dict=False
        )[0]
        return predicted


def new_tokenizer(emoji: list[Emoji], folder: Path) -> Any:
    """A Unigram tokenizer over the captions with T5's conventions, saved in `folder`."""
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    own.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    own.train_from_iterator(texts(emoji), trainer)
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=TEXT_TOKENS).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def new_model(vocabulary: int) -> TextToImage:
    """The untrained transformer and text encoder; the head and the attention to the text begin at zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=WIDTH // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        in_channels=3,
        out_channels=3,
        num_layers=BLOCKS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=SIDE,
        patch_size=PATCH,
    )
    parts: Any = transformer
    for layer in (parts.proj_out, *(block.attn2.to_out[0] for block in parts.transformer_blocks)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(parts.adaln_single.linear.weight, std=0.02)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=TEXT_LAYERS,
            num_heads=TEXT_WIDTH // 32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return TextToImage(transformer, encoder)


def new_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order with Stable Diffusion's betas, which leave a trace of the picture at the last time.

    PixArt's betas divide a small model's error at that time by 0.006, which leaves pictures of one or two colours.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        solver_order=2,
        timestep_spacing="linspace",
    )


class Captions:
    """Captions of pictures as tokens; each batch draws new ones."""

    def __init__(self, emoji: list[Emoji], tokenizer: Any) -> None:
        self.emoji, self.tokenizer = emoji, tokenizer

    def draw(self, indices: list[int], draw: np.random.Generator, *, null_share: float) -> tuple[Tensor, Tensor]:
        """ids and mask (B, L) of a caption for each picture; a share `null_share` of the captions is empty."""
        captions = [self.emoji[index].caption(draw) if draw.random() >= null_share else "" for index in indices]
        return self.tokens(captions)

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask


def train_model(pictures: Path, output: Path, *, iterations: int, seed: int, compiled: bool) -> None:
    """Train transformer and text encoder, and write the pipeline's folder."""
    pixels, emoji = read(pictures)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(seed)
    captions = Captions(emoji, new_tokenizer(emoji, output / "tokenizer"))
    model = new_model(len(captions.tokenizer))
    alphas = new_scheduler().alphas_cumprod
    forward = torch.compile(model) if compiled else model

    def loss_of(iteration: int) -> Tensor:
        draw = np.random.default_rng([seed, iteration])
        indices = draw.integers(0, len(images), BATCH).tolist()
        ids, mask = captions.draw(indices, draw, null_share=NULL_SHARE)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        time_ = ((torch.arange(BATCH) + torch.rand(1, generator=generator)) / BATCH * len(alphas)).long()
        noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(add_noise(images[indices], noise, time_, alphas), time_, ids, mask)
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        snr = alphas[time_] / (1 - alphas[time_])
        return (errors * (MAX_SNR / snr).clamp(max=1)).mean()

    def write(mean: dict[str, Tensor]) -> None:
        write_pipeline(output, mean, captions.tokenizer)

    train_base(model, loss_of, output, Course(iterations, WARMUP, MEAN_HALF_LIFE, SAVE_EVERY), write)


def write_pipeline(output: Path, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """The pipeline's folder, in half precision."""
    model = new_model(len(tokenizer))
    model.load_state_dict(weights)
    model = model.half()
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=model.encoder,
        vae=None,
        transformer=model.transformer,
        scheduler=new_scheduler(),
    )
    pipeline.save_pretrained(output)


def train_feedback(pictures: Path, output: Path, *, iterations: int, seed: int) -> None:
    """Train the feedback block on the base in `output`; the text encoder embeds each caption once."""
    pixels, emoji = read(pictures)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    encoder = T5EncoderModel.from_pretrained(output / "text_encoder", dtype=torch.float32)
    captions = Captions(emoji, T5TokenizerFast.from_pretrained(output / "tokenizer"))
    draw = np.random.default_rng(seed)
    rows = list(range(len(emoji))) * DRAWINGS
    ids, mask = captions.draw(rows, draw, null_share=0.0)
    empty = captions.tokens([""])
    with torch.inference_mode():
        text, null = (encoder(i, attention_mask=m).last_hidden_state.clone() for i, m in ((ids, mask), empty))
    conditions = {"text": text, "text_mask": mask.float()}
    recipe = Recipe.read("emoji", [f"optimisation.iterations={iterations}", f"seed={seed}"])
    stream = MemoryStream(
        Batch(images[rows], conditions),
        global_batch=recipe.optimisation.batch_size,
        seed=seed,
        null={"text": null, "text_mask": empty[1].float()},
    )
    source = str(output.resolve() / "transformer")
    backbone = load_backbone(source)
    model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
    setup = RunSetup(output / "feedback", Base(source, fingerprint(backbone)), base_scheduler(source), cpu=True)
    outcome = train(model, recipe, stream, setup)
    save_ilf(load_ilf(output / "feedback"), output, base=BASE_FOLDER, training=facts_of(recipe, outcome))
    print(f"feedback: {outcome.iteration} iterations, mean loss {outcome.mean_loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of the npm package")
    parser.add_argument("--output", type=Path, default=Path("build/emoji"))
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--feedback-iterations", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_model(
        options.pictures, options.output, iterations=options.iterations, seed=options.seed, compiled=not options.eager
    )
    if options.feedback_iterations:
        train_feedback(options.pictures, options.output, iterations=options.feedback_iterations, seed=options.seed)


if __name__ == "__main__":
    main()
