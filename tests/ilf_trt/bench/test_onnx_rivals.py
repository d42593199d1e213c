"""The rivals in ONNX Runtime: they make what eager PyTorch makes of the same noise, with guidance and without."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from ilf_trt import ILFModel, load_ilf
from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.bench.diffusers_graph import DiffusersGraph
from ilf_trt.bench.inputs import read_latents, relative_difference, write_inputs
from ilf_trt.bench.one_graph import one_graph
from ilf_trt.bench.rivals import CACHED_EVERY, Eager, Run, cached_blocks
from ilf_trt.bench.torch_process import TorchProcess
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.plan import StepPlan, cached_block_forwards
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.request import changed_plan

ROUNDING = 1e-4
SCALE = 3.0
STEPS = 4


@pytest.fixture(scope="module")
def model(dit_checkpoint: Path) -> ILFModel:
    return load_ilf(dit_checkpoint).float()


@pytest.fixture(scope="module")
def bundle(dit_build: BuildResult) -> Bundle:
    return dit_build.bundle


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> StepPlan:
    return changed_plan(bundle.manifest, STEPS, feedback="none")


Opening = Callable[[ILFModel, Bundle, StepPlan, torch.Tensor, float], AbstractContextManager[Run]]


def of_diffusers(
    model: ILFModel, bundle: Bundle, plan: StepPlan, noise: torch.Tensor, scale: float
) -> AbstractContextManager[Run]:
    return DiffusersGraph.opened(model, plan, scale, threads=1)


def of_a_step(
    model: ILFModel, bundle: Bundle, plan: StepPlan, noise: torch.Tensor, scale: float
) -> AbstractContextManager[Run]:
    return one_graph(model, bundle, plan, noise, scale, threads=1)


@pytest.mark.parametrize(("opening", "scale", "pictures"), [(of_diffusers, 1.0, 1), (of_a_step, SCALE, 2)])
def test_a_graph_makes_the_latents_of_eager_pytorch(
    opening: Opening, scale: float, pictures: int, model: ILFModel, bundle: Bundle, plan: StepPlan
) -> None:
    noise = torch.randn(pictures, *bundle.manifest.spec.latent, generator=torch.Generator().manual_seed(0))
    conditions = {"class_labels": torch.arange(1, 1 + pictures, dtype=torch.int32)}
    eager = Eager(model, bundle.manifest.scheduler, scale, "cpu", torch.float32)
    with opening(model, bundle, plan, noise, scale) as run:
        for noise_of_run in (noise, noise.flip(0), noise):  # the memory of a run does not leak into the next one
            got, wanted = run(conditions, noise_of_run), eager.reference(plan, conditions, noise_of_run)
            difference = relative_difference(got.numpy(), wanted.numpy())
            assert difference is not None
            assert difference < ROUNDING


def test_diffusers_own_graph_is_refused_on_a_gpu_before_it_is_exported(
    model: ILFModel, plan: StepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("it was exported"))
    with (
        pytest.raises(InvalidRequest, match=r"^onnx is measured on a CPU only; leave it out of --against$"),
        DiffusersGraph.opened(model, plan, SCALE, device="cuda:0"),
    ):
        pass


def test_one_graph_is_for_precisions_that_onnx_runtime_has_on_a_cpu(
    model: ILFModel, bundle: Bundle, plan: StepPlan
) -> None:
    class Rounded:
        manifest = replace(bundle.manifest, precision=Precision.BF16)

    noise = torch.zeros(1, *bundle.manifest.spec.latent)
    with (
        pytest.raises(InvalidRequest, match="one-graph runs fp32 and fp16 on a CPU, the bundle is in bf16"),
        one_graph(model, cast(Bundle, Rounded()), plan, noise, SCALE),
    ):
        pass


def test_the_process_of_torch_has_rows_for_caches_and_both_graphs(
    bundle: Bundle, plan: StepPlan, dit_checkpoint: Path, tmp_path: Path
) -> None:
    manifest, process = bundle.manifest, TorchProcess()
    process.load(
        {
            "checkpoint": str(dit_checkpoint),
            "bundle": str(bundle.path),
            "device": "cpu",
            "precision": "fp32",
            "scheduler": manifest.scheduler,
            "guidance": manifest.spec.guidance,
            "guidance_scale": SCALE,
            "base_sha256": manifest.base_sha256,
            "scales": list(manifest.scales),
            "threads": 0,
        }
    )
    inputs, latents = tmp_path / "inputs.npz", tmp_path / "latents.npy"
    noise = np.random.default_rng(0).standard_normal((1, *manifest.spec.latent), np.float32)
    write_inputs(inputs, noise, {"class_labels": np.array([3], np.int32)})
    process.inputs({"path": str(inputs), "keep": False})
    process.reference({"plan": plan.as_json(), "path": str(latents)})
    wanted = read_latents(latents)
    counted = process.open({"slug": "cache", "plan": plan.as_json(), "rival": "cache", "ilf": False})["block_forwards"]
    costs = cached_block_forwards(plan.blocks, len(plan.steps), cached=cached_blocks(plan.blocks), every=CACHED_EVERY)
    assert 0 < counted == sum(costs) < plan.block_forwards
    for slug in ("onnx", "one-graph"):
        answer = process.open({"slug": slug, "plan": plan.as_json(), "rival": slug, "ilf": False})
        assert answer["library"].startswith("onnxruntime 1.")
        assert process.shoot({"slug": slug})["device_ms"] is None
        process.latents({"slug": slug, "path": str(latents)})
        difference = relative_difference(read_latents(latents), wanted)
        assert difference is not None
        assert difference < ROUNDING


def test_one_graph_is_measured_on_a_cpu_only(plan: StepPlan) -> None:
    process = TorchProcess()
    process._device = "cuda:0"
    with pytest.raises(InvalidRequest, match="one-graph is measured on a CPU only; leave it out of --against"):
        process.open({"slug": "one-graph", "plan": plan.as_json(), "rival": "one-graph", "ilf": False})
