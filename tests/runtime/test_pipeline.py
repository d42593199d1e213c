"""Generation beside the eager reference, under changed plans, in threads, and what the door refuses."""

import gc
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilf_trt import ILFModel, load_ilf
from ilf_trt.contract.bundle import CONSTANTS_FILE, Bundle, write_manifest
from ilf_trt.contract.plan import StepPlan, make_plan
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.solver import DDIM, DPM, EULER
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import BundleError, Cancelled, EngineError, InvalidRequest, NonFinite
from ilf_trt.model.sampling import sample
from ilf_trt.runtime import NoiseSource, Pipeline
from ilf_trt.runtime.arguments import MOST_PICTURES
from ilf_trt.runtime.engine import Engine, Launch
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tests.conftest import BLOCKS, CLASSES, LOOP, TEXT_CHANNELS, TEXT_TOKENS

Conditions = dict[str, NDArray[Any]]

# Float32 products in another order over six steps of a model with random weights; measured below 2e-5.
TRAJECTORY_LIMIT = 1e-4
# A batch of another size makes the same products in another order; measured below 3e-6.
FLOAT32_ROUNDING = 2e-5
# A change that matters is thousands of times larger than rounding.
VISIBLE = 1e-2
# Far past any sensible strength: the latents reach 1e20 and stay finite.
HUGE_GUIDANCE = 1e4
TIMEOUT_S = 60
SMALL_CHANGE_BYTES = 25_000  # over 100 calls; measured 4,000; their results alone would be 51,200


@dataclass(frozen=True)
class Served:
    """A pipeline, and the torch model that it was made from."""

    pipeline: Pipeline
    model: ILFModel

    @property
    def bundle(self) -> Path:
        return self.pipeline.bundle.path

    def conditions(self, pictures: int) -> Conditions:
        """Conditions in which no two pictures are alike."""
        rng = np.random.default_rng(1)
        text = (pictures, TEXT_TOKENS, TEXT_CHANNELS)
        lengths = TEXT_TOKENS - np.arange(pictures)[:, None] % 3
        values: Conditions = {
            "class_labels": np.arange(pictures) * 3 % CLASSES,
            "text": rng.standard_normal(text, np.float32),
            "text_mask": (np.arange(TEXT_TOKENS) < lengths).astype(np.float32),
            "negative_text": rng.standard_normal(text, np.float32),
            "negative_text_mask": (np.arange(TEXT_TOKENS) < 2).astype(np.float32)[None].repeat(pictures, axis=0),
            "resolution": rng.uniform(64, 512, (pictures, 2)).astype(np.float32),
            "aspect_ratio": rng.uniform(0.5, 2, (pictures, 1)).astype(np.float32),
        }
        return {port.name: values[port.name] for port in self.pipeline.manifest.spec.conditions}

    def noise(self, pictures: int) -> NDArray[np.float32]:
        return np.random.default_rng(2).standard_normal((pictures, *self.pipeline.manifest.spec.latent), np.float32)

    def expected(
        self, plan: StepPlan, pictures: int, *, guidance_scale: float, scheduler: Mapping[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Torch, with diffusers' own scheduler."""
        latents = sample(
            self.model,
            plan,
            self.pipeline.manifest.scheduler if scheduler is None else scheduler,
            {name: torch.from_numpy(array) for name, array in self.conditions(pictures).items()},
            torch.from_numpy(self.noise(pictures)),
            guidance_scale=guidance_scale,
        )
        return latents.numpy()


def serve(kind: str, request: pytest.FixtureRequest) -> Iterator[Served]:
    checkpoint: Path = request.getfixturevalue(f"{kind}_checkpoint")
    with Pipeline.load(request.getfixturevalue(f"{kind}_build").bundle.path, threads=1) as pipeline:
        yield Served(pipeline, load_ilf(checkpoint))


@pytest.fixture(scope="module")
def dit(request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from serve("dit", request)


@pytest.fixture(scope="module")
def pixart(request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from serve("pixart", request)


@pytest.fixture(params=["dit", "pixart"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(request.param)
    return found


def relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def labels(*values: int) -> Conditions:
    return {"class_labels": np.array(values)}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3, "feedback": "none"},
        {"steps": 3, "feedback": "all"},
        {"steps": 3, "feedback": "outer:1"},
        {"steps": 6, "feedback": "none"},
        {"steps": 6, "feedback": "all"},
        {"steps": 6, "feedback": "outer:1"},
        {"steps": 6, "feedback": "alternate"},
        {"steps": 6, "feedback": "all", "rule": "anneal"},
        {"steps": 6, "feedback": "all", "rule": "uniform"},
        {"steps": 6, "feedback": "all", "rule": "none"},
        {"steps": 6, "feedback": "all", "ratio": "n/m"},
        {"steps": 1, "feedback": "all"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_a_trajectory_of_any_plan_equals_the_reference(served: Served, changes: dict[str, Any]) -> None:
    plan = served.pipeline.plan(**changes)
    result = served.pipeline.generate(latents=served.noise(2), plan=plan, guidance_scale=2.5, **served.conditions(2))
    assert relative(result.latents, served.expected(plan, 2, guidance_scale=2.5)) < TRAJECTORY_LIMIT
    assert result.plan == plan


@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 16])
def test_a_batch_of_any_size_equals_the_reference(served: Served, pictures: int) -> None:
    plan = served.pipeline.manifest.plan
    result = served.pipeline.generate(latents=served.noise(pictures), guidance_scale=2.5, **served.conditions(pictures))
    assert relative(result.latents, served.expected(plan, pictures, guidance_scale=2.5)) < TRAJECTORY_LIMIT


@pytest.mark.parametrize("guidance_scale", [0, 1, 1.5, -2.0, 7.5, np.float32(4)])
def test_guidance_of_any_strength_equals_the_reference(served: Served, guidance_scale: float) -> None:
    plan = served.pipeline.manifest.plan
    result = served.pipeline.generate(latents=served.noise(2), guidance_scale=guidance_scale, **served.conditions(2))
    expected = served.expected(plan, 2, guidance_scale=float(guidance_scale))
    assert relative(result.latents, expected) < TRAJECTORY_LIMIT


SCHEDULERS: dict[str, dict[str, Any]] = {
    "DPM-Solver++ 1": {"_class_name": DPM, "solver_order": 1},
    "DPM-Solver++ 2": {"_class_name": DPM, "solver_order": 2},
    "DPM-Solver++ 2 heun": {"_class_name": DPM, "solver_order": 2, "solver_type": "heun"},
    "DPM-Solver++ 3": {"_class_name": DPM, "solver_order": 3},
    "DPM-Solver++ 3 karras": {"_class_name": DPM, "solver_order": 3, "use_karras_sigmas": True},
    "DPM-Solver 2": {
        "_class_name": DPM,
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
        "solver_order": 2,
    },
    "v-prediction": {"_class_name": DPM, "prediction_type": "v_prediction"},
    "DDIM": {"_class_name": DDIM, "clip_sample": False},
    "Euler": {"_class_name": EULER},
    "Euler trailing": {"_class_name": EULER, "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("feedback", ["none", "outer:2"])
@pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver:FutureWarning")
def test_another_scheduler_needs_a_plan_and_no_build(served: Served, name: str, feedback: str) -> None:
    scheduler = SCHEDULERS[name]
    plan = make_plan(scheduler, 6, blocks=BLOCKS, loop=Loop(*LOOP), feedback=feedback)
    result = served.pipeline.generate(latents=served.noise(2), plan=plan, guidance_scale=2.0, **served.conditions(2))
    expected = served.expected(plan, 2, guidance_scale=2.0, scheduler=scheduler)
    assert relative(result.latents, expected) < TRAJECTORY_LIMIT


def test_feedback_guidance_and_plan_change_the_pictures(served: Served) -> None:
    given = {**served.conditions(2), "latents": served.noise(2)}
    base = served.pipeline.generate(**given).latents
    others = {
        "feedback": served.pipeline.generate(plan=served.pipeline.plan(feedback="none"), **given),
        "rule": served.pipeline.generate(plan=served.pipeline.plan(rule="none"), **given),
        "steps": served.pipeline.generate(plan=served.pipeline.plan(steps=3), **given),
        "guidance": served.pipeline.generate(guidance_scale=3, **given),
    }
    assert {name: None for name, other in others.items() if relative(other.latents, base) < TRAJECTORY_LIMIT} == {}


def test_a_plain_step_does_not_use_its_time_after_feedback(dit: Served) -> None:
    plan = dit.pipeline.plan(steps=3, feedback="none")
    odd = replace(plan, steps=tuple(replace(step, t_post=step.t / 2) for step in plan.steps))
    result = dit.pipeline.generate(latents=dit.noise(2), plan=odd, guidance_scale=2.0, **dit.conditions(2))
    assert relative(result.latents, dit.expected(odd, 2, guidance_scale=2.0)) < TRAJECTORY_LIMIT


@pytest.mark.parametrize("noise", NoiseSource)
def test_the_same_seed_makes_the_same_pictures_and_another_seed_others(dit: Served, noise: NoiseSource) -> None:
    first, again, other = (
        dit.pipeline.generate(seed=seed, noise=noise, **labels(3, 7)).latents for seed in (11, 11, 12)
    )
    np.testing.assert_array_equal(first, again)
    assert relative(other, first) > VISIBLE


def test_the_two_sources_make_different_pictures_of_a_seed(dit: Served) -> None:
    numpy_made, torch_made = (dit.pipeline.generate(seed=11, noise=n, **labels(3)).latents for n in ("numpy", "torch"))
    assert relative(numpy_made, torch_made) > VISIBLE


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, -1])
def test_torch_noise_is_what_torch_randn_draws(dit: Served, seed: int) -> None:
    drawn = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).numpy()
    from_seed = dit.pipeline.generate(seed=seed, noise="torch", **labels(1, 2, 3)).latents
    from_latents = dit.pipeline.generate(latents=drawn, **labels(1, 2, 3)).latents
    assert relative(from_seed, from_latents) < FLOAT32_ROUNDING


def test_noise_is_torchs_when_nothing_is_said(dit: Served) -> None:
    silent, said = dit.pipeline.generate(seed=3, **labels(1)), dit.pipeline.generate(seed=3, noise="torch", **labels(1))
    np.testing.assert_array_equal(silent.latents, said.latents)


@pytest.mark.parametrize("noise", NoiseSource)
def test_a_list_of_seeds_makes_a_picture_independent_of_its_batch(dit: Served, noise: NoiseSource) -> None:
    batch = dit.pipeline.generate(seed=[5, 6, 7], noise=noise, **labels(1, 2, 3)).latents
    for index, seed in enumerate((5, 6, 7)):
        alone = dit.pipeline.generate(seed=[seed], noise=noise, **labels(index + 1)).latents
        assert relative(batch[[index]], alone) < FLOAT32_ROUNDING


def test_one_seed_draws_different_noise_for_each_picture(dit: Served) -> None:
    latents = dit.pipeline.generate(seed=5, **labels(4, 4)).latents
    assert relative(latents[0], latents[1]) > VISIBLE


def test_given_latents_replace_the_seed(dit: Served) -> None:
    first, second = (dit.pipeline.generate(latents=dit.noise(2), seed=seed, **labels(3, 7)).latents for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_latents_in_another_memory_order_are_the_same_latents(dit: Served) -> None:
    noise = dit.noise(2)
    strided = np.asfortranarray(noise)
    results = [dit.pipeline.generate(latents=latents, **labels(3, 7)).latents for latents in (noise, strided)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(strided, noise)


def test_inputs_are_what_a_generation_runs(dit: Served) -> None:
    noise, conditions = dit.pipeline.inputs(seed=5, **labels(3, 7))
    wanted = dit.pipeline.generate(seed=5, **labels(3, 7)).latents
    np.testing.assert_array_equal(dit.pipeline.generate(latents=noise, **conditions).latents, wanted)


@pytest.mark.parametrize("method", ["generate", "inputs"])
def test_a_request_past_the_memory_is_refused_before_it_takes_any(dit: Served, method: str) -> None:
    with Pipeline.load(dit.bundle, threads=1, max_memory=16 << 20, check_hashes=False) as pipeline:
        refused(lambda: getattr(pipeline, method)(**labels(*[0] * MOST_PICTURES)), "the limit is 16 MiB; ask for fewer")


@pytest.mark.parametrize("pictures", [1, 3])
def test_latents_are_float32_of_the_batch(served: Served, pictures: int) -> None:
    latents = served.pipeline.generate(**served.conditions(pictures)).latents
    assert latents.shape == (pictures, *served.pipeline.manifest.spec.latent)
    assert (latents.dtype, latents.flags.c_contiguous, latents.flags.owndata) == (np.float32, True, True)


def test_timings_add_up(served: Served) -> None:
    plan = served.pipeline.plan(steps=5)
    timings = served.pipeline.generate(plan=plan, **served.conditions(2)).timings
    assert set(timings.graph_ms) == {"cond", "pre", "loop_body", "loop_feedback", "post"}
    assert len(timings.step_ms) == 5
    assert 0 < sum(timings.graph_ms.values()) <= timings.total_ms
    assert sum(timings.step_ms) + timings.graph_ms["cond"] == pytest.approx(sum(timings.graph_ms.values()))
    assert np.isfinite(timings.overhead_us_per_step)
    assert timings.overhead_us_per_step >= 0


def test_a_plan_without_feedback_spends_nothing_on_it(dit: Served) -> None:
    timings = dit.pipeline.generate(plan=dit.pipeline.plan(feedback="none"), **labels(1)).timings
    assert timings.graph_ms["loop_feedback"] == 0


def test_a_result_is_not_overwritten_by_the_next(dit: Served) -> None:
    first = dit.pipeline.generate(seed=1, **labels(3, 7)).latents
    kept = first.copy()
    dit.pipeline.generate(seed=2, **labels(3, 7))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "before",
    [
        {"seed": 5},
        {"guidance_scale": HUGE_GUIDANCE},
        {"latents": np.full((2, 1, 8, 8), 1e15, np.float32)},
        {"feedback": "all"},
    ],
    ids=["another seed", "huge guidance", "huge latents", "another plan"],
)
def test_a_generation_does_not_depend_on_the_one_before(dit: Served, before: dict[str, Any]) -> None:
    with Pipeline.load(dit.bundle, threads=1, sessions=1, check_hashes=False) as fresh:
        wanted = fresh.generate(seed=9, **labels(3, 7)).latents
    with Pipeline.load(dit.bundle, threads=1, sessions=1, check_hashes=False) as used:
        options = {**before, "plan": used.plan(feedback=before["feedback"])} if "feedback" in before else before
        options = {name: value for name, value in options.items() if name != "feedback"}
        garbage = used.generate(**options, **labels(0, 1)).latents
        assert np.isfinite(garbage).all()
        assert relative(garbage, wanted) > VISIBLE
        got = used.generate(seed=9, **labels(3, 7)).latents
    np.testing.assert_array_equal(got, wanted)


def test_a_generation_does_not_depend_on_nan_in_the_one_before(dit: Served) -> None:
    with Pipeline.load(dit.bundle, threads=1, sessions=1, check_hashes=False) as used:
        wanted = used.generate(seed=9, **labels(3, 7)).latents
        with pytest.raises(NonFinite, match=r"^graph pre gave NaN or infinity in step 1 of 6 \(t = 999\); "):
            used.generate(latents=np.full((2, 1, 8, 8), 3e38, np.float32), **labels(3, 7))
        np.testing.assert_array_equal(used.generate(seed=9, **labels(3, 7)).latents, wanted)


@dataclass
class Counter:
    """How many launches were under way at once."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0
    most: int = 0


@dataclass
class CountedEngine:
    """An engine that tells when it runs, and lingers."""

    engine: Engine
    counter: Counter

    @property
    def graph(self) -> Graph:
        return self.engine.graph

    def bind(self, arrays: Mapping[str, NDArray[Any]]) -> Launch:
        launch = self.engine.bind(arrays)

        def counted() -> None:
            with self.counter.lock:
                self.counter.running += 1
                self.counter.most = max(self.counter.most, self.counter.running)
            time.sleep(1e-3)
            launch()
            with self.counter.lock:
                self.counter.running -= 1

        return counted

    def close(self) -> None:
        self.engine.close()


def engines_of(bundle: Bundle) -> dict[str, OnnxRuntimeEngine]:
    return {
        graph.name: OnnxRuntimeEngine(graph, OnnxFile.of_bundle(bundle, graph), threads=1)
        for graph in bundle.manifest.graphs
    }


def test_eight_threads_on_one_pipeline_make_what_one_makes(dit: Served) -> None:
    requests = [
        {"seed": index, "plan": dit.pipeline.plan(steps=2 + index % 3), **labels(*range(1 + index % 4))}
        for index in range(24)
    ]
    wanted = [dit.pipeline.generate(**request).latents for request in requests]
    with Pipeline.load(dit.bundle, threads=1, check_hashes=False) as shared, ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda request: shared.generate(**request).latents, requests, timeout=TIMEOUT_S))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sessions", [1, 2])
def test_more_threads_than_sessions_wait_their_turn(dit: Served, sessions: int) -> None:
    bundle, counter = dit.pipeline.bundle, Counter()
    counted = {name: CountedEngine(engine, counter) for name, engine in engines_of(bundle).items()}
    wanted = dit.pipeline.generate(seed=4, **labels(3)).latents
    backend = Host(counted, bundle.manifest, bundle.constants())
    with Pipeline.of(bundle, backend, sessions=sessions) as pipeline, ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(pipeline.generate, seed=4, **labels(3)) for _ in range(6)]
        for future in futures:
            np.testing.assert_array_equal(future.result(TIMEOUT_S).latents, wanted)
    assert counter.most == sessions


class FailsOnce(CountedEngine):
    """An engine whose first launch fails."""

    def bind(self, arrays: Mapping[str, NDArray[Any]]) -> Launch:
        launch = self.engine.bind(arrays)

        def failing() -> None:
            self.counter.most += 1
            if self.counter.most == 1:
                raise EngineError("out of luck")
            launch()

        return failing


def test_a_generation_that_failed_gives_its_session_back(dit: Served) -> None:
    bundle = dit.pipeline.bundle
    engines: dict[str, Engine] = dict(engines_of(bundle))
    engines["loop_body"] = FailsOnce(engines["loop_body"], Counter())
    wanted = dit.pipeline.generate(seed=4, **labels(3)).latents
    with Pipeline.of(bundle, Host(engines, bundle.manifest, bundle.constants()), sessions=1) as pipeline:
        with pytest.raises(EngineError, match="out of luck"):
            pipeline.generate(seed=4, **labels(3))
        with ThreadPoolExecutor(1) as thread:
            got = thread.submit(pipeline.generate, seed=4, **labels(3)).result(TIMEOUT_S)
    np.testing.assert_array_equal(got.latents, wanted)


LOAD_EACH = """
import sys
from ilf_trt.runtime import Pipeline
made = []
for threads in sys.argv[2:]:
    with Pipeline.load(sys.argv[1], threads=int(threads)) as pipeline:
        made.append(pipeline.generate(class_labels=[1]).latents)
assert all(abs(latents - made[0]).max() < 1e-4 * abs(made[0]).max() for latents in made)
"""


@pytest.mark.parametrize("threads", [(0, 1, 2, 0), (1, 0), (2, 1)], ids=str)
def test_pipelines_of_different_engine_threads_live_in_one_process(dit_bundle: Path, threads: tuple[int, ...]) -> None:
    command = [sys.executable, "-c", LOAD_EACH, dit_bundle, *map(str, threads)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def texts(pixart: Served, length: int) -> Conditions:
    """Conditions of two pictures whose text has `length` tokens, without masks."""
    given = pixart.conditions(2)
    return {name: value[:, :length] if "text" in name else value for name, value in given.items() if "mask" not in name}


@pytest.mark.parametrize("length", [1, 4, TEXT_TOKENS])
def test_short_text_equals_the_same_text_padded_under_a_zero_mask(pixart: Served, length: int) -> None:
    short, padded = texts(pixart, length), texts(pixart, length)
    rng = np.random.default_rng(7)
    for name in ("text", "negative_text"):
        garbage = rng.standard_normal((2, TEXT_TOKENS - length, TEXT_CHANNELS), np.float32)
        padded[name] = np.concatenate([padded[name], garbage], axis=1)
        padded[f"{name}_mask"] = (np.arange(TEXT_TOKENS) < length).astype(np.float32)[None].repeat(2, axis=0)
    got, wanted = (pixart.pipeline.generate(seed=1, **given).latents for given in (short, padded))
    assert relative(got, wanted) < FLOAT32_ROUNDING


def test_a_mask_as_short_as_its_text_is_padded_with_it(pixart: Served) -> None:
    short = texts(pixart, 4)
    masks = {f"{name}_mask": np.ones((2, 4), np.float32) for name in ("text", "negative_text")}
    got, wanted = (pixart.pipeline.generate(seed=1, **given).latents for given in ({**short, **masks}, short))
    np.testing.assert_array_equal(got, wanted)


def test_a_mask_hides_its_tokens(pixart: Served) -> None:
    given = texts(pixart, TEXT_TOKENS)
    masked = {**given, "text_mask": (np.arange(TEXT_TOKENS) < 3).astype(np.float32)[None].repeat(2, axis=0)}
    shown, hidden = (pixart.pipeline.generate(seed=1, **one).latents for one in (given, masked))
    assert relative(hidden, shown) > TRAJECTORY_LIMIT


def test_a_mask_of_another_length_than_its_text_is_refused(pixart: Served) -> None:
    given = {**texts(pixart, 3), "text_mask": np.ones((2, 5), np.float32)}
    with pytest.raises(InvalidRequest, match="text_mask"):
        pixart.pipeline.generate(**given)


def test_text_longer_than_the_bundles_is_refused(pixart: Served) -> None:
    given = {**texts(pixart, TEXT_TOKENS), "text": np.zeros((2, TEXT_TOKENS + 1, TEXT_CHANNELS), np.float32)}
    with pytest.raises(InvalidRequest, match=rf"text has shape \(2, {TEXT_TOKENS + 1}, {TEXT_CHANNELS}\), expected"):
        pixart.pipeline.generate(**given)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_conditions_of_another_float_width_are_taken(pixart: Served, dtype: str) -> None:
    given = {name: value.astype(np.float16) for name, value in pixart.conditions(2).items()}
    wide = {name: value.astype(dtype) for name, value in given.items()}
    results = [pixart.pipeline.generate(seed=1, **one).latents for one in (given, wide)]
    np.testing.assert_array_equal(*results)


def test_generations_leave_nothing_behind(dit: Served) -> None:
    """The interpreter and ONNX Runtime's binding fill caches for about a hundred calls, then nothing grows."""

    def traced_bytes_after(calls: int) -> int:
        for _ in range(calls):
            dit.pipeline.generate(seed=1, steps=2, **labels(1, 2))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = traced_bytes_after(100)
        assert traced_bytes_after(100) - before < SMALL_CHANGE_BYTES
    finally:
        tracemalloc.stop()


def refused(generate: Callable[[], object], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        generate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([1.0, 2.0], "class_labels is float64, expected whole numbers"),
        ([True, False], "class_labels is bool, expected whole numbers"),
        (["1", "2"], "this model has no names of classes"),
        (None, "'class_labels' is missing"),
        ([], "class_labels"),
        ([[1, 2]], r"class_labels has shape \(1, 2\)"),
        ([[1], [2, 3]], "class_labels"),
        ([1, CLASSES + 1], f"class_labels holds {CLASSES + 1}, expected 0 to {CLASSES}"),
        ([1, -1], f"class_labels holds -1, expected 0 to {CLASSES}"),
        ([2**40], f"class_labels holds {2**40}"),
        (np.array([2**63 + 1], np.uint64), "class_labels holds 9223372036854775809"),
        ([2**70], "class_labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(dit: Served, given: Any, match: str) -> None:
    refused(lambda: dit.pipeline.generate(class_labels=given), match)


def test_the_null_class_is_a_label(dit: Served) -> None:
    assert np.isfinite(dit.pipeline.generate(class_labels=[CLASSES]).latents).all()


def test_an_unknown_condition_is_refused_with_the_known_ones(dit: Served) -> None:
    refused(lambda: dit.pipeline.generate(class_label=[1]), "'class_label' is not a condition .* takes class_labels")


def test_a_missing_condition_is_refused_by_name(pixart: Served) -> None:
    given = pixart.conditions(2)
    del given["text"]
    refused(lambda: pixart.pipeline.generate(**given), "'text' is missing")


def test_the_size_is_told_to_a_model_that_asks_for_it(pixart: Served) -> None:
    given = pixart.conditions(2)
    height, width = pixart.pipeline.manifest.spec.latent[1:]
    told = given | {
        "resolution": np.full((2, 2), [8 * height, 8 * width], np.float32),
        "aspect_ratio": np.full((2, 1), height / width, np.float32),
    }
    silent = {name: value for name, value in given.items() if name not in ("resolution", "aspect_ratio")}
    results = [pixart.pipeline.generate(seed=1, **one).latents for one in (told, silent)]
    np.testing.assert_array_equal(*results)


def test_one_class_is_one_picture(dit: Served) -> None:
    one, listed = (dit.pipeline.generate(class_labels=given).latents for given in (3, [3]))
    np.testing.assert_array_equal(one, listed)


def test_more_pictures_than_the_batch_are_split_and_are_the_same_pictures(dit: Served) -> None:
    asked = [index % CLASSES for index in range(37)]
    noise = dit.noise(37)
    together = dit.pipeline.generate(class_labels=asked, latents=noise).latents
    for few in (slice(0, 16), slice(16, 32), slice(32, 37)):
        alone = dit.pipeline.generate(class_labels=asked[few], latents=noise[few]).latents
        assert relative(together[few], alone) < FLOAT32_ROUNDING


def test_guidance_of_one_and_less_runs_every_picture_once_and_as_asked_for(dit: Served) -> None:
    noise = dit.noise(2)
    own = [dit.pipeline.generate(guidance_scale=s, latents=noise, **labels(1, 2)).latents for s in (1.0, 0.0, -3.0)]
    other = dit.pipeline.generate(guidance_scale=0.0, latents=noise, **labels(3, 4)).latents
    assert (own[0] == own[1]).all()
    assert (own[0] == own[2]).all()
    assert relative(other, own[0]) > VISIBLE
    shapes = []
    for scale in (0.0, 1.0, 1.5):
        dit.pipeline.generate(guidance_scale=scale, **labels(1, 2))
        with dit.pipeline._loading.lend() as sessions, sessions("transformer") as session:
            job = next(reversed(session._trajectories))
            shapes.append(session.trajectory(job)._arrays["hidden"].shape[0])  # type: ignore[attr-defined]
    assert shapes == [2, 2, 4]


def test_every_step_calls_progress_and_a_generation_can_be_cancelled(dit: Served) -> None:
    calls: list[tuple[str, int, int]] = []
    dit.pipeline.generate(steps=3, progress=lambda *step: calls.append(step), **labels(1))
    assert calls == [("step", 1, 3), ("step", 2, 3), ("step", 3, 3)]
    cancel = Event()

    def second(what: str, done: int, total: int, detail: str = "") -> None:
        if done == 2:
            cancel.set()

    with pytest.raises(Cancelled, match="cancelled after 2 of 5 steps"):
        dit.pipeline.generate(steps=5, progress=second, cancel=cancel, **labels(1))
    wanted = dit.pipeline.generate(seed=4, **labels(1)).latents
    with pytest.raises(Cancelled, match="cancelled before it began"):
        dit.pipeline.generate(seed=4, cancel=cancel, **labels(1))
    np.testing.assert_array_equal(dit.pipeline.generate(seed=4, **labels(1)).latents, wanted)


def test_no_conditions_at_all_are_refused(dit: Served) -> None:
    refused(lambda: dit.pipeline.generate(), "'class_labels' is missing")


@pytest.mark.parametrize("name", ["text", "negative_text_mask", "aspect_ratio"])
def test_conditions_for_different_numbers_of_pictures_are_refused(pixart: Served, name: str) -> None:
    given = pixart.conditions(2)
    refused(lambda: pixart.pipeline.generate(**{**given, name: given[name][:1]}), f"'{name}' is for 1 pictures")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_conditions_that_are_not_finite_in_float32_are_refused(pixart: Served, value: float) -> None:
    text = np.full((2, TEXT_TOKENS, TEXT_CHANNELS), value)
    refused(lambda: pixart.pipeline.generate(**{**pixart.conditions(2), "text": text}), "text holds")


def test_ragged_text_is_refused(pixart: Served) -> None:
    ragged = [[[0.0] * TEXT_CHANNELS], [[0.0] * TEXT_CHANNELS] * 2]
    refused(lambda: pixart.pipeline.generate(**{**texts(pixart, 3), "text": ragged}), "text")


@pytest.mark.parametrize(
    ("latents", "match"),
    [
        (np.zeros((3, 1, 8, 8), np.float32), r"latents are float32 \(3, 1, 8, 8\), expected float32 \(2, 1, 8, 8\)"),
        (np.zeros((1, 1, 8, 8), np.float32), "latents are"),
        (np.zeros((2, 8, 8), np.float32), "latents are"),
        (np.zeros((2, 1, 8, 8)), "latents are float64"),
        (np.zeros((2, 1, 8, 8), np.float16), "latents are float16"),
        (np.full((2, 1, 8, 8), np.nan, np.float32), "latents hold NaN"),
        (np.full((2, 1, 8, 8), np.inf, np.float32), "latents hold NaN or infinity"),
        ("noise", "latents are"),
        ([[1.0], [1.0, 2.0]], "latents"),
    ],
)
def test_latents_that_do_not_fit_are_refused(dit: Served, latents: Any, match: str) -> None:
    refused(lambda: dit.pipeline.generate(latents=latents, **labels(1, 2)), match)


@pytest.mark.parametrize(
    ("seed", "noise", "match"),
    [
        (1.0, "torch", "seed is 1.0"),
        (None, "torch", "seed is None"),
        ("12", "torch", "seed"),
        (True, "torch", "seed"),
        ([1, 2.5], "torch", "seed"),
        ([1, True], "torch", "seed"),
        (-1, "numpy", "numpy noise seed must be >= 0"),
        ([0, -1], "numpy", "numpy noise seed must be >= 0"),
        (2**64, "torch", "torch noise seed must be in"),
        ([1], "torch", "1 seeds for 2 pictures"),
        ([1, 2, 3], "numpy", "3 seeds for 2 pictures"),
        ([], "torch", "0 seeds for 2 pictures"),
        (0, "cuda", "noise 'cuda' is unknown; use numpy or torch"),
        (0, None, "noise None is unknown"),
    ],
)
def test_seeds_and_sources_that_do_not_fit_are_refused(dit: Served, seed: Any, noise: Any, match: str) -> None:
    refused(lambda: dit.pipeline.generate(seed=seed, noise=noise, **labels(1, 2)), match)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "2", [1.0, 2.0]])
def test_a_guidance_scale_that_is_no_finite_number_is_refused(dit: Served, scale: Any) -> None:
    refused(lambda: dit.pipeline.generate(guidance_scale=scale, **labels(1)), "guidance_scale")


@pytest.mark.parametrize(("blocks", "loop"), [(BLOCKS + 1, LOOP), (BLOCKS, (0, 2)), (BLOCKS, (1, 1))])
def test_the_plan_of_another_model_is_refused(dit: Served, blocks: int, loop: tuple[int, int]) -> None:
    plan = make_plan(dit.pipeline.manifest.scheduler, 3, blocks=blocks, loop=Loop(*loop))
    refused(lambda: dit.pipeline.generate(plan=plan, **labels(1)), f"plan is for {blocks} blocks and loop")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rule": "linear"}, "rule 'linear' is unknown; it is .*anneal"),
        ({"ratio": "m/m"}, "ratio 'm/m' is unknown"),
        ({"feedback": "some"}, "feedback pattern 'some' is unknown"),
        ({"steps": 3, "feedback": "3"}, "feedback step 3 does not exist"),
    ],
)
def test_plan_settings_that_do_not_exist_are_refused(dit: Served, changes: dict[str, Any], match: str) -> None:
    refused(lambda: dit.pipeline.plan(**changes), match)


def test_a_closed_pipeline_is_refused(dit: Served) -> None:
    with Pipeline.load(dit.bundle, threads=1, check_hashes=False) as pipeline:
        pass
    refused(lambda: pipeline.generate(**labels(1)), "this pipeline is closed")


def test_a_pipeline_may_be_closed_twice(dit: Served) -> None:
    pipeline = Pipeline.load(dit.bundle, threads=1, check_hashes=False)
    pipeline.close()
    pipeline.close()


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "CUDA:0", "gpu:0", ""])
def test_an_unknown_device_is_refused(dit: Served, device: str) -> None:
    refused(lambda: Pipeline.load(dit.bundle, device=device), "is unknown; it is cpu, cuda or cuda:N")


def test_an_unknown_engine_is_refused(dit: Served) -> None:
    refused(lambda: Pipeline.load(dit.bundle, engine="openvino"), "'openvino' is unknown; it is .*onnxruntime")


def test_latents_cannot_be_left_on_a_device_that_there_is_not(dit: Served) -> None:
    refused(lambda: dit.pipeline.generate(class_labels=[3], on_device=True), "on_device needs a pipeline on a GPU")


def test_tensorrt_on_the_cpu_is_refused(dit: Served) -> None:
    refused(lambda: Pipeline.load(dit.bundle, engine="tensorrt"), "run on a GPU; pass device='cuda:0'")


@pytest.mark.parametrize("sessions", [0, -1])
def test_less_than_one_session_is_refused(dit: Served, sessions: int) -> None:
    refused(lambda: Pipeline.load(dit.bundle, sessions=sessions), f"sessions is {sessions}")


@pytest.mark.parametrize("content", [None, b"junk"], ids=["missing", "junk"])
def test_constants_that_cannot_be_read_are_refused_in_one_line(
    dit: Served, content: bytes | None, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.ilf"
    shutil.copytree(dit.bundle, copy)
    (copy / CONSTANTS_FILE).unlink()
    if content is not None:
        (copy / CONSTANTS_FILE).write_bytes(content)
    write_manifest(copy, dit.pipeline.manifest)
    with pytest.raises(BundleError, match=r"constants\.npz.*; build the bundle again$") as caught:
        Pipeline.load(copy, threads=1)
    assert "\n" not in str(caught.value)


def test_other_constants_make_other_pictures(dit: Served, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ilf"
    shutil.copytree(dit.bundle, copy)
    np.savez(copy / CONSTANTS_FILE, **{name: 2 * array for name, array in dit.pipeline.bundle.constants().items()})
    write_manifest(copy, dit.pipeline.manifest)
    with Pipeline.load(copy, threads=1) as other:
        fed, plain = (
            relative(*(one.generate(seed=1, plan=one.plan(feedback=feedback), **labels(3)).latents for one in both))
            for feedback, both in (("all", (other, dit.pipeline)), ("none", (other, dit.pipeline)))
        )
    assert fed > TRAJECTORY_LIMIT
    assert plain == 0
