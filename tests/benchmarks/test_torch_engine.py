"""torch as the engine of the runtime: on stand-ins of a GPU it gives the latents of torch alone, captured."""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rivals import full_size_models
from benchmarks.rivals.full_size_models import make_backbone
from benchmarks.rivals.torch_engine import CudaLane, Served, Work, opened
from benchmarks.speed.stand_ins import StandInLane, stand_in_gpu
from ilf_trt import attach
from ilf_trt.contract.plan import SCHEDULERS, make_plan
from ilf_trt.contract.spec import Loop, Precision
from ilf_trt.errors import OutOfMemory
from ilf_trt.export.segments import segments_of, spec_of
from ilf_trt.model.sampling import sample
from ilf_trt.runtime.gpu.cuda import Stream
from tests.conftest import BLOCKS, LOOP, TEXT_TOKENS, small_dit, small_pixart

SOLVER = SCHEDULERS["dpmsolver++"]
GUIDANCE = 2.0
PICTURES = 2
ROUNDING = 2e-5


@pytest.fixture
def cuda() -> Iterator[Any]:
    with stand_in_gpu() as made:
        yield made


def served(kind: str, precision: Precision = Precision.FP32) -> Served:
    model = attach(small_dit() if kind == "dit" else small_pixart(sized=True), LOOP)
    model.feedback.scales.data.fill_(0.1)
    plan = make_plan(SOLVER, 4, blocks=BLOCKS, loop=Loop(*LOOP), feedback="outer:1")
    return Served(model.eval(), plan, SOLVER, precision, PICTURES, 1 if kind == "dit" else TEXT_TOKENS, GUIDANCE)


def request(pipeline: Any, seed: int) -> dict[str, Any]:
    spec = pipeline.manifest.spec
    normal = np.random.default_rng(seed).standard_normal
    conditions = spec.conditioning.example(PICTURES, (128, 128), guidance=True, normal=normal)
    return {"latents": normal((PICTURES, *spec.latent), np.float32), "guidance_scale": GUIDANCE, **conditions}


def by_torch(of: Served, asked: dict[str, Any]) -> Any:
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in asked.items() if name != "guidance_scale"}
    noise = tensors.pop("latents")
    return sample(of.model, of.plan, SOLVER, tensors, noise, guidance_scale=GUIDANCE).numpy()


def far(got: Any, wanted: Any) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_trajectory_is_that_of_torch_alone_and_is_captured_after_the_first(kind: str, cuda: Any) -> None:
    of = served(kind)
    with opened(of, StandInLane(cuda)) as pipeline:
        for seed in range(3):
            asked = request(pipeline, seed)
            result = pipeline.generate(**asked)
            assert far(result.latents, by_torch(of, asked)) <= ROUNDING
            assert result.timings.captured == (seed > 0)
        assert (cuda.captures, cuda.launches) == (1, 2)


def test_half_precision_runs_through_the_ports_of_that_precision(cuda: Any) -> None:
    for precision in (Precision.FP16, Precision.BF16):
        of = served("pixart", precision)
        with opened(of, StandInLane(cuda)) as pipeline:
            asked = request(pipeline, 1)
            assert 1e-6 < far(pipeline.generate(**asked).latents, by_torch(of, asked)) <= precision.parity_limit


def test_a_kept_session_runs_on_another_thread(cuda: Any) -> None:
    of = served("dit")
    with opened(of, StandInLane(cuda)) as pipeline:
        asked = request(pipeline, 0)
        pipeline.generate(**asked)
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(lambda: pipeline.generate(**asked)).result()
    assert result.timings.captured
    assert far(result.latents, by_torch(of, asked)) <= ROUNDING


def test_one_graph_holds_every_run(cuda: Any) -> None:
    of = served("dit")
    with opened(of, StandInLane(cuda)) as pipeline:
        pipeline.generate(**request(pipeline, 0))
        (labels,) = cuda.captured
    wanted = ["cond"]
    for step in of.plan.steps:
        wanted += ["pre", "loop_body", *(["loop_feedback", "loop_body"] if step.feedback else []), "post"]
    assert [label[1] for label in labels if label[0] == "engine"] == wanted


def test_a_run_that_torch_refuses_is_an_error_of_the_device(cuda: Any) -> None:
    of = served("dit")
    with opened(of, StandInLane(cuda)) as pipeline:
        cuda.fail("execute")
        with pytest.raises(OutOfMemory):
            pipeline.generate(**request(pipeline, 0))
        pipeline.generate(**request(pipeline, 0))


def test_on_a_gpu_a_run_is_on_the_runtimes_stream_in_the_pool_of_that_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    pools: list[Any] = []

    class Pool:
        def __init__(self) -> None:
            pools.append(weakref.ref(self))

    @contextmanager
    def entering(*what: Any, **_: Any) -> Iterator[None]:
        entered.extend(what)
        yield
        entered.pop()

    handles = {"init": lambda: None, "device": entering, "stream": entering, "use_mem_pool": entering, "MemPool": Pool}
    for name, value in {**handles, "ExternalStream": lambda handle, device: (handle, device)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    lane, first, second = CudaLane(1), Stream(SimpleNamespace(handle=7)), Stream(SimpleNamespace(handle=8))
    seen: list[list[Any]] = []
    for stream in (first, first, second):
        lane.enter(stream)
    for stream in (first, second, first):
        lane.put(stream, Work("run", lambda: seen.append(list(entered)), [], [], None))
    assert seen == [[(7, "cuda:1"), pools[0]()], [(8, "cuda:1"), pools[1]()], [(7, "cuda:1"), pools[0]()]]
    seen.clear()
    lane.leave(first, None)
    assert pools[0]() is not None
    lane.leave(first, None)
    assert [pool() is None for pool in pools] == [True, False]


class HostTensors(TorchDispatchMode):
    """The operators that see a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, output))
        self.seen += [str(func) for each in leaves if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
        return output


@pytest.mark.parametrize("name", ["dit-xl-256", "pixart-alpha-1024", "pixart-sigma-512"])
def test_a_segment_neither_waits_for_the_gpu_nor_copies_to_it(name: str) -> None:
    """On torch's meta device a wait is an error, and a copy shows as a tensor of the host."""
    with torch.device("meta"):
        model = attach(make_backbone(name).half(), full_size_models.LOOP)
    options: Any = {"guidance": True, "text_tokens": 120, "train_timesteps": 1000, "precision": Precision.FP16}
    spec = spec_of(model, **options)
    sizes = {"B": 1, "R": 2, "T": 12, **spec.sides(spec.latent[1:])}
    with HostTensors() as host, torch.no_grad():
        for segment in segments_of(model, spec, Precision.FP16).values():
            graph = segment.graph
            inputs, outputs = (
                [torch.empty(p.resolve(sizes), dtype=getattr(torch, p.dtype), device="meta") for p in ports]
                for ports in (graph.inputs, graph.outputs)
            )
            values = segment(*inputs)
            values = values if isinstance(values, tuple) else (values,)
            assert [(v.shape, v.dtype) for v in values] == [(v.shape, v.dtype) for v in outputs]
    assert host.seen == []
