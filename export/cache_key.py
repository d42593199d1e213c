"""The key of an exported graph: everything that its bytes depend on, so that a build need not export it twice."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import ilf_trt
from ilf_trt.contract.ports import BLOCKS
from ilf_trt.contract.spec import Batch, Precision
from ilf_trt.export.segments import Segment

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "diffusers")


def fingerprint_of_graph(segment: Segment, precision: Precision, batch: Batch, amax: Mapping[str, float] | None) -> str:
    """sha256 over the segment's weights, its border, the options, the tools' versions and this package's own source.

    The weights are those of its blocks and of the backbone outside blocks; the feedback block's reach `cond` as inputs.
    """
    digest = hashlib.sha256(source_digest().encode())
    facts = {
        "graph": asdict(segment.graph),
        "spec": asdict(segment.spec),
        "precision": precision.value,
        "batch": asdict(batch),
        "amax": amax,
        "names": [segment.name_in_model(f"blocks.{index}") for index in range(len(segment.blocks))],
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    outside = {
        name: value for name, value in segment.backbone.state_dict().items() if not name.startswith(f"{BLOCKS}.")
    }
    for name, tensor in (*segment.blocks.state_dict().items(), *outside.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def source_digest() -> str:
    """Versions, and hashes of the files that can change a graph: a changed exporter never meets its old work."""
    folders = (Path(ilf_trt.__file__).parent, Path(__file__).parent)
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    lines = [f"{tool} {version(tool)}" for tool in TOOLS]
    lines += [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return "\n".join(lines)
