"""The CPU path: a pipeline on the CPU loads no module of a GPU."""

import subprocess
import sys
from pathlib import Path

GPU_PACKAGES = ("ilf_trt.runtime.gpu", "cuda", "tensorrt", "tensorrt_rtx", "nvtx", "torch")
TIMEOUT_S = 60

GENERATE = """
import sys
from ilf_trt.runtime import Pipeline
with Pipeline.load(sys.argv[1], threads=1) as pipeline:
    assert pipeline.generate(class_labels=[3]).pixels is not None
    pipeline.warm_up(1)
print(*sorted(sys.modules), sep="\\n")
"""


def test_a_pipeline_on_the_cpu_loads_no_module_of_a_gpu(dit_bundle: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", GENERATE, dit_bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    modules = done.stdout.split()
    assert "ilf_trt.runtime.host" in modules
    gpu_prefixes = tuple(f"{package}." for package in GPU_PACKAGES)
    assert [name for name in modules if f"{name}.".startswith(gpu_prefixes)] == []
