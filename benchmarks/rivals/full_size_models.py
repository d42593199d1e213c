"""The paper's five models at full size, and two tiny ones for dry runs, all with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXT_CHANNELS = 4096
PIXART = {"cross_attention_dim": 1152, "caption_channels": TEXT_CHANNELS, "num_layers": 28}
MODELS: dict[str, dict[str, Any]] = {
    "dit-xl-256": {"kind": "dit", "text_tokens": 0, "config": {"sample_size": 32}},
    "pixart-alpha-512": {"kind": "pixart", "text_tokens": 120, "config": {**PIXART, "sample_size": 64}},
    "pixart-alpha-1024": {
        "kind": "pixart",
        "text_tokens": 120,
        "config": {**PIXART, "sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": True},
    },
    "pixart-sigma-512": {
        "kind": "pixart",
        "text_tokens": 300,
        "config": {**PIXART, "sample_size": 64, "use_additional_conditions": False},
    },
    "pixart-sigma-1024": {
        "kind": "pixart",
        "text_tokens": 300,
        "config": {**PIXART, "sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False},
    },
}
LOOP = (8, 19)
SMALL = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
TINY: dict[str, dict[str, Any]] = {
    "tiny-dit": {
        "kind": "dit",
        "text_tokens": 0,
        "config": {**SMALL, "sample_size": 8, "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10},
    },
    "tiny-pixart": {
        "kind": "pixart",
        "text_tokens": 7,
        "config": {
            **SMALL,
            "sample_size": 16,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "use_additional_conditions": True,
        },
    },
}
TINY_LOOP = (1, 1)
PIXELS = 8  # to a side of a latent's cell


def make_backbone(name: str) -> Any:
    """The diffusers model, in float32; DiT's embedders are equal copies, as in the converted official checkpoints."""
    import diffusers

    facts = (MODELS | TINY)[name]
    if facts["kind"] == "pixart":
        return diffusers.PixArtTransformer2DModel(**facts["config"])
    backbone = diffusers.DiTTransformer2DModel(**facts["config"])
    first = backbone.transformer_blocks[0].norm1.emb.state_dict()
    for block in backbone.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return backbone


def make_checkpoint(name: str, folder: Path) -> None:
    """Write an ILF checkpoint of random weights, the base in float16, with a file of conditions to calibrate on."""
    import torch

    from ilf_trt import attach, save_ilf

    torch.manual_seed(0)
    model = attach(make_backbone(name).half(), TINY_LOOP if name in TINY else LOOP)
    model.feedback.scales.data.fill_(0.1)
    save_ilf(model, folder)
    np.savez(folder / "conditions.npz", **make_conditions(name, 1))


def make_conditions(name: str, pictures: int) -> dict[str, NDArray[Any]]:
    """Conditions of `pictures` pictures by port name; every text has its full length."""
    facts = (MODELS | TINY)[name]
    config = facts["config"]
    if facts["kind"] == "dit":
        return {"class_labels": (207 + np.arange(pictures, dtype=np.int32)) % config.get("num_embeds_ada_norm", 1000)}
    rng = np.random.default_rng(0)
    shape = (pictures, facts["text_tokens"], config["caption_channels"])
    texts = {f"{p}text": rng.standard_normal(shape, np.float32) for p in ("", "negative_")}
    conditions = {**texts, **{f"{n}_mask": np.ones(shape[:2], np.float32) for n in texts}}
    if config.get("use_additional_conditions", config["sample_size"] == 128):
        side = np.float32(config["sample_size"] * PIXELS)
        conditions |= {"resolution": np.full((pictures, 2), side), "aspect_ratio": np.ones((pictures, 1), np.float32)}
    return conditions
