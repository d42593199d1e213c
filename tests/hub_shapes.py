"""Repositories in the shapes of the hub: its config keys, class names, file names, shards, links; tiny random weights.

The keys and values that carry no size are those of facebook/DiT-XL-2-256 (saved by diffusers 0.12), of
PixArt-alpha/PixArt-XL-2-1024-MS (0.22), of stabilityai/sd-vae-ft-ema (0.4.2) and of DeepFloyd/t5-v1_1-xxl.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from ilf_trt.model.pretrained import ATTENTION
from tests import small_pipelines

REVISION = "b89adadeccd9ead2adcb9fa2825d3fabec48d404"
COMMON = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 1000,
    "num_layers": 3,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
    "use_linear_projection": False,
}
DIT = {**COMMON, "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None, "norm_type": "ada_norm_zero"}
PIXART = {
    **COMMON,
    "_diffusers_version": "0.22.0.dev0",
    "attention_type": "default",
    "attention_head_dim": 24,
    "caption_channels": small_pipelines.TEXT_WIDTH,
    "cross_attention_dim": 48,
    "double_self_attention": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "sample_size": 128,
    "patch_size": 16,
}
DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.12.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}
DPM = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}
VAE_KEYS = (
    "_class_name",
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "out_channels",
    "sample_size",
    "up_block_types",
)
T5 = {
    "_name_or_path": "DeepFloyd/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 48,
    "d_kv": 8,
    "d_model": small_pipelines.TEXT_WIDTH,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.21.1",
    "use_cache": True,
}
TOKENIZER = {
    "additional_special_tokens": [],
    "eos_token": "</s>",
    "extra_ids": 0,
    "model_max_length": 1000000000000000019884624838656,
    "name_or_path": "DeepFloyd/t5-v1_1-xxl",
    "pad_token": "<pad>",
    "sp_model_kwargs": {},
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}


def dit_repository(folder: Path) -> Path:
    """As facebook/DiT-XL-2-256: every weight is pickled."""
    _write(folder / "model_index.json", _index("DiTPipeline", "0.12.0.dev0") | {"id2label": small_pipelines.NAMES})
    _write(folder / "scheduler" / "scheduler_config.json", DDIM)
    _write(folder / "transformer" / "config.json", DIT)
    torch.save(transformer(DIT).state_dict(), folder / "transformer" / "diffusion_pytorch_model.bin")
    torch.save(_old_vae(folder / "vae"), folder / "vae" / "diffusion_pytorch_model.bin")
    return folder


def pixart_repository(folder: Path) -> Path:
    """As PixArt-alpha/PixArt-XL-2-1024-MS: safetensors, the text encoder in two shards, the words as SentencePiece."""
    text = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    _write(folder / "model_index.json", _index("PixArtAlphaPipeline", "0.22.0.dev0") | text)
    _write(folder / "scheduler" / "scheduler_config.json", DPM)
    _write(folder / "transformer" / "config.json", PIXART)
    _save(transformer(PIXART).state_dict(), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    _save(_old_vae(folder / "vae"), folder / "vae" / "diffusion_pytorch_model.safetensors")
    words = _words(folder / "tokenizer")
    _write(folder / "text_encoder" / "config.json", T5 | {"vocab_size": words})
    state = small_pipelines.spread(T5EncoderModel(T5Config(**T5, vocab_size=words))).state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    shards(state, folder / "text_encoder", 2)
    return folder


def transformer(config: dict[str, Any]) -> Any:
    model = DiTTransformer2DModel if config["norm_type"] == "ada_norm_zero" else PixArtTransformer2DModel
    extra = ("double_self_attention", "only_cross_attention", "num_vector_embeds", "use_linear_projection")
    left_out = {*extra, "cross_attention_dim"} if model is DiTTransformer2DModel else {*extra}
    options = {name: value for name, value in config.items() if name[0] != "_" and name not in left_out}
    torch.manual_seed(0)
    return small_pipelines.spread(model(**options))


def vae() -> Any:
    torch.manual_seed(0)
    return small_pipelines.vae(4)


def shards(state: dict[str, Any], folder: Path, count: int) -> None:
    """`state` in `count` files and their index, as transformers writes them."""
    where = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name] for name in sorted(state)[number::count]}
        _save(part, folder / file)
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in state.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def in_cache(repository: Path, cache: Path, hub_id: str) -> Path:
    """The snapshot of `repository` in a cache of huggingface_hub: links to blobs, and the ref of `main`."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / REVISION, root / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(repository.rglob("*")):
        if path.is_file():
            place = path.relative_to(repository)
            blob, link = blobs / place.as_posix().replace("/", "-"), snapshot / place
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(REVISION)
    return snapshot


def _index(kind: str, version: str) -> dict[str, Any]:
    return {
        "_class_name": kind,
        "_diffusers_version": version,
        "scheduler": ["diffusers", "DDIMScheduler" if kind == "DiTPipeline" else "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _old_vae(folder: Path) -> dict[str, Any]:
    """The state under the names of diffusers 0.4, and its config without the options that came later."""
    model = vae()
    config = {name: model.config[name] for name in VAE_KEYS if name in model.config}
    _write(folder / "config.json", {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **config})
    state = {}
    for name, tensor in model.state_dict().items():
        for old, today in ATTENTION.items():
            name = name.replace(f".attentions.0.{today}.", f".attentions.0.{old}.")
        state[name] = tensor.clone()
    return state


def _words(folder: Path) -> int:
    """A SentencePiece model, and how many pieces the tokenizer has."""
    import sentencepiece

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(small_pipelines.SENTENCES * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    _write(folder / "tokenizer_config.json", TOKENIZER)
    special = {name: TOKENIZER[name] for name in ("eos_token", "pad_token", "unk_token")}
    _write(folder / "special_tokens_map.json", special)
    return int(sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).vocab_size())


def _save(state: dict[str, Any], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2))
