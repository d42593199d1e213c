"""Peak memory of the export of a text encoder, whose weights come in shards and are never all in memory.

python -m benchmarks.speed.text_export [--layers 24 --width 1024 --shards 8 --precision fp32]
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import append_rows
from ilf_trt.contract.spec import Precision
from ilf_trt.process_memory import peak_mib

MIB = 1 << 20


def write_encoder(folder: Path, layers: int, width: int, shards: int) -> int:
    """Write a T5 encoder with random weights in shards, and return the bytes of its weights."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=width, d_ff=4 * width, num_layers=layers, num_heads=width // 64)
    model = T5EncoderModel(config)
    size_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(folder / "text_encoder", max_shard_size=size_bytes // shards)
    return sum(path.stat().st_size for path in (folder / "text_encoder").glob("*.safetensors"))


def export(folder: Path, precision: Precision) -> dict[str, Any]:
    """Export in this process: the growth of its peak memory in MiB, and the seconds."""
    from types import SimpleNamespace

    from ilf_trt.export.pipeline.text_encoder import export_text, text_spec_of

    source: Any = SimpleNamespace(path=folder)
    spec = text_spec_of(source, tokens=300, precision=precision)
    before_mib, start_s = peak_mib(), time.perf_counter()
    export_text(source, spec, folder / "text.onnx")
    return {"growth_mib": round(peak_mib() - before_mib, 1), "export_s": round(time.perf_counter() - start_s, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--precision", type=Precision, default=Precision.FP32)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(export(options.folder, options.precision)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights_bytes = write_encoder(Path(folder), options.layers, options.width, options.shards)
        files = len(list(Path(folder).glob("text_encoder/*.safetensors")))
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed.text_export",
            "--folder",
            folder,
            "--precision",
            options.precision.value,
        ]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers = json.loads(process.stdout.splitlines()[-1])
    row = {
        "layers": options.layers,
        "width": options.width,
        "shards": files,
        "precision": options.precision.value,
        "weights_mib": round(weights_bytes / MIB, 1),
        **numbers,
    }
    print(row)
    append_rows(
        "text-export",
        shlex.join(["python", "-m", "benchmarks.speed.text_export", *sys.argv[1:]]),
        [row],
        key=("layers", "width", "shards", "precision"),
    )


if __name__ == "__main__":
    main()
