"""The key of an exported graph: everything that its bytes depend on, so that a build need not export it twice."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import ilf_trt.contract
import ilf_trt.model
from ilf_trt.contract.manifest import AttentionAmax
from ilf_trt.contract.spec import BatchRange, Precision

from .segments import Segment

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "diffusers")


def graph_key(
    segment: Segment,
    precision: Precision,
    batch: BatchRange,
    amax: Mapping[str, float] | None,
    attentions: Mapping[str, AttentionAmax] | None = None,
    *,
    pad: bool = False,
) -> str:
    """sha256 over the segment's weights, its border, the options, the tools' versions and the source.

    The weights are those of its blocks and of the backbone outside blocks; the feedback block's reach `cond` as inputs.
    """
    digest = hashlib.sha256(source_digest().encode())
    facts = {
        "graph": asdict(segment.graph),
        "spec": asdict(segment.spec),
        "precision": precision.value,
        "batch": asdict(batch),
        "amax": amax,
        "attentions": {name: asdict(ranges) for name, ranges in (attentions or {}).items()},
        "pad": pad,
        "names": [segment.name_in_model(f"blocks.{index}") for index in range(len(segment.blocks))],
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for kind in (*type(segment.adapter).__mro__, *type(segment.backbone).__mro__):
        digest.update(_source_of(kind))
    inside = f"{segment.spec.block_path}."
    outside = {name: value for name, value in segment.backbone.state_dict().items() if not name.startswith(inside)}
    for name, tensor in (*segment.blocks.state_dict().items(), *outside.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def _source_of(kind: type[Any]) -> bytes:
    """The file of a class, which need not be of this package. One without a file has another key every time."""
    if kind.__module__ == "builtins":
        return b""
    try:
        return Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        return uuid4().bytes


@cache
def source_digest() -> str:
    """Versions of the tools, and hashes of the source that decides what is in a graph: contract, model and export.

    A command or a help text is in none of the three, so its change keeps every cached graph.
    """
    lines = [f"{tool} {version(tool)}" for tool in TOOLS]
    for folder in (Path(ilf_trt.contract.__path__[0]), Path(ilf_trt.model.__path__[0]), Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            lines.append(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return "\n".join(lines)
