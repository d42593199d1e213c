"""The paper's five models at full size, with random weights."""

from pathlib import Path
from typing import Any

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


def make_checkpoint(name: str, folder: Path) -> None:
    """Write an ILF checkpoint of random weights, the base in float16, with a text file to calibrate on."""
    import diffusers
    import numpy as np
    import torch

    from ilf_trt import attach, save_ilf

    facts = MODELS[name]
    torch.manual_seed(0)
    kind = diffusers.DiTTransformer2DModel if facts["kind"] == "dit" else diffusers.PixArtTransformer2DModel
    backbone = kind(**facts["config"])
    if facts["kind"] == "dit":
        first = backbone.transformer_blocks[0].norm1.emb.state_dict()
        for block in backbone.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    model = attach(backbone.half(), LOOP)
    model.feedback.scales.data.fill_(0.1)
    save_ilf(model, folder)
    rng = np.random.default_rng(0)
    if facts["kind"] == "dit":
        conditions: dict[str, Any] = {"class_labels": np.array([207], np.int32)}
    else:
        shape = (1, facts["text_tokens"], TEXT_CHANNELS)
        texts = {f"{p}text": rng.standard_normal(shape, np.float32) for p in ("", "negative_")}
        conditions = {**texts, **{f"{n}_mask": np.ones(shape[:2], np.float32) for n in texts}}
        if backbone.use_additional_conditions:
            conditions |= {"resolution": np.full((1, 2), 1024, np.float32), "aspect_ratio": np.ones((1, 1), np.float32)}
    np.savez(folder / "conditions.npz", **conditions)
