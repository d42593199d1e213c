"""Misuse of the Python interface: one line that says what is wrong, soon, and the pipeline serves as before."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.errors import MESSAGE_CHARS, BundleError, IlfError, InvalidRequest, PortMismatch, told
from ilf_trt.runtime.arguments import array_of
from ilf_trt.runtime.pipeline import Pipeline
from ilf_trt.runtime.result import Result
from ilf_trt.runtime.text.tokenizer import Tokenizer
from tests.runtime.test_loading import fake, low_memory, manifest
from tests.small_tokenizer import unigram

SOON_S = 1.0
LABELS = {"class_labels": [3]}
DIGITS_5000 = 10**4999
NAN, INFINITY = float("nan"), float("inf")
LATENTS = np.zeros((1, 4, 16, 16), np.float32)
COND: dict[str, Any] = {"times": [1.0], "class_labels": [3]}  # what graph `cond` takes


class Explosive:
    """Raises wherever Python asks it for something."""

    def _explode(self, *_: object) -> NoReturn:
        raise RuntimeError("line one\nline two \x1b[31m" + "x" * 1000)

    __repr__ = __str__ = __iter__ = __len__ = __getitem__ = __array__ = __index__ = __int__ = __float__ = _explode
    __fspath__ = __bool__ = __eq__ = __hash__ = __call__ = __dlpack_device__ = _explode  # type: ignore[assignment]


class Silent:
    """Has a repr of two lines and a megabyte, and nothing else."""

    def __repr__(self) -> str:
        return "\n\x1b[31m" + "x" * (1 << 20)


class Endless(list[Any]):
    """A list that says it is empty and never ends."""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return count()


class NoArray:
    """Says that it is an array, and raises when it shall be one."""

    def __array__(self, *_: object) -> NoReturn:
        raise MemoryError


def nested(depth: int) -> list[Any]:
    lists: list[Any] = [1]
    for _ in range(depth):
        lists = [lists]
    return lists


def around() -> list[Any]:
    lists: list[Any] = [1]
    lists.append(lists)
    return lists


# Each row names an argument of `generate` and gives values that it cannot be; `class_labels` is 3 unless it is given.
GENERATE: dict[str, tuple[Any, ...]] = {
    "prompt": (5, b"a", "a cat", ["a cat"], [], {}, Explosive(), object(), "a\ud800", repeat("a")),
    "negative_prompt": ("a cat", 5, Explosive()),
    "class_labels": (
        *(np.array(3), 2.5, [2.5], [True], "cat", ["cat", 3], ["3", Explosive()], [], [[3]], [3, [4]], {}, {3}, b"3"),
        *(DIGITS_5000, [DIGITS_5000], -1, 99, [1 << 40], [None], object(), Explosive(), [Explosive()], NoArray()),
        *(repeat(3), count(), around(), nested(100), nested(100_000), Endless(), range(1 << 62), Silent()),
        *([3] * 100_000, np.zeros(1 << 20, np.int32), np.array(["a"]), np.array([None]), NAN, [1, "3", None]),
        *(slice(3), Fraction(1, 2), 3j, np.datetime64("2020-01-01"), [[[]]], memoryview(b"abc"), "\ud800"),
    ),
    "size": (
        *((INFINITY, 8), (NAN, 8), [8], [], (8, 8, 8), 8, "88", "8x8", (8.5, 8), (0, 8), (-8, 8), (True, True)),
        *((DIGITS_5000, 8), (1 << 70, 1 << 70), ("8", "8"), {8, 9}, count(), Explosive(), (Explosive(), 8), object()),
        *((8, None), np.array([[8, 8]]), Endless(), (1 << 20, 1 << 20)),
    ),
    "steps": (0, -1, 2.0, "4", True, NAN, [4], DIGITS_5000, -DIGITS_5000, 10**9, object(), Explosive(), Silent()),
    "plan": ("outer:1", 4, {}, object(), Explosive(), [], type),
    "guidance_scale": (
        *(NAN, INFINITY, -INFINITY, "2", True, [2.0], 2j, DIGITS_5000, -DIGITS_5000, 1e39, Fraction(DIGITS_5000, 3)),
        *(np.array([1.0]), np.float64("nan"), object(), Explosive(), b"2"),
    ),
    "seed": (
        *(True, [True], 1.5, "7", None, DIGITS_5000, -DIGITS_5000, [DIGITS_5000], [1, 2], [], {}, {7}, b"7", NAN),
        *(object(), Explosive(), [Explosive()], count(), Endless(), np.array([1.5]), [[7]], [None], 1 << 64, Silent()),
    ),
    "noise": ("dice", 3, None, b"torch", object(), Explosive(), ["torch"], "x" * 1_000_000, "\n"),
    "latents": (
        *(5, "noise", [1], np.zeros(3), LATENTS.astype(float), LATENTS[:, :1], LATENTS * NAN, LATENTS + INFINITY),
        *([[1], [1, 2]], object(), Explosive(), NoArray(), nested(100_000), around(), LATENTS.tolist(), b"", count()),
        *({"a": 1}, repeat(1.0), np.array([None]), np.zeros((1, 4, 16, 16), "M8[s]"), True, [Explosive()], Silent()),
    ),
    "clean_captions": (1, 0, "no", object(), Explosive(), []),
    "binning": (1, None, "yes", Explosive()),
    "decode": (1, None, "yes", Explosive(), np.array([True])),
    "profile": (1, None, "yes", Explosive()),
    "on_device": (1, None, True, Explosive()),
    "progress": (3, "print", True, [print], object()),
    "cancel": (True, 3, "no", object(), threading.Lock(), threading.Event, Explosive()),
    "timeout": (-1, -0.1, NAN, INFINITY, -INFINITY, "1", True, [1], -DIGITS_5000, object(), Explosive()),
    "no_condition": (3, Explosive()),
    "text": (np.zeros((1, 3)), Explosive()),
    "negative_class_labels": ([3],),
    "\n" + "x" * 10_000: (3,),
}
TEXT = np.zeros((1, 7, 4), np.float32)
# The same for a bundle with a text encoder; `prompt` is "a cat" unless it is given.
PROMPTS: dict[str, tuple[Any, ...]] = {
    "prompt": (
        *(5, 2.5, True, b"a", [], {}, {"a": 1}, {"a"}, [5], ["a", None], [["a"]], [b"a"], "\ud800", ["a", "b\udfff"]),
        *(
            repeat("a"),
            count(),
            Endless(["a"]),
            object(),
            Explosive(),
            [Explosive()],
            Silent(),
            np.array([1]),
            None,
            type,
        ),
        *(["a"] * 100_000, np.array("a"), nested(100_000), iter([])),
    ),
    "negative_prompt": (5, [], ["a", "b"], b"a", [None], "\ud800", object(), Explosive(), repeat("a"), {"a": 1}),
    "class_labels": (3, [3], object(), Explosive()),
    "text": (TEXT, [[[0.0]]], 5, object(), Explosive()),
    "clean_captions": (1, "no", Explosive()),
    "seed": ([1, 2], DIGITS_5000),
    "size": ([8], (INFINITY, 8)),
}
WARM_UP: dict[str, tuple[Any, ...]] = {
    "pictures": (0, -1, 1.5, True, "1", [1], DIGITS_5000, 10**9, NAN, object(), Explosive()),
    "plan": ("x", 4, object(), Explosive()),
    "size": ((INFINITY, 8), [8], 8, "8", object(), Explosive(), count()),
}
PLAN: dict[str, tuple[Any, ...]] = {
    "steps": (0, -1, 2.0, "4", True, NAN, DIGITS_5000, 10**9, 10**5, object(), Explosive()),
    "feedback": (
        *("x", "", 5, [0, 1], b"all", "outer:", "outer:-1", "first:x", "5-1", "99", "-1", "0," * 9000),
        *(f"first:{'9' * 3000}", "9" * 3000, ",", "０", "all\n", "\ud800", object(), Explosive(), Silent()),
    ),
    "rule": ("x", 5, True, b"none", [], "x" * 1_000_000, object(), Explosive()),
    "ratio": ("x", 5, 0.5, b"n/m", "", object(), Explosive()),
}
RUN: dict[str, tuple[Any, ...]] = {
    "graph": ("x", 5, None, "", ["pre"], "x" * 1_000_000, object(), Explosive(), {}),
    "arrays": (
        *({}, [], 5, None, "times", object(), Explosive(), [("times", 1)], {"times": [1.0]}),
        *({**COND, "times": 3}, {**COND, "times": "a"}, {**COND, "times": [[1.0]]}, {**COND, "times": [[1], [1, 2]]}),
        *({**COND, "class_labels": labels} for labels in ([NAN], [99], [-1], ["3"], 3, [DIGITS_5000], [None], [[3]])),
        *({**COND, "class_labels": labels} for labels in (Explosive(), NoArray(), around(), nested(100_000), count())),
    ),
}
CLOSE: dict[str, tuple[Any, ...]] = {"timeout": (-1, NAN, INFINITY, "1", True, [1], object(), Explosive())}
LOAD: dict[str, tuple[Any, ...]] = {
    "path": (
        3,
        None,
        b"bundle",
        "",
        "\0",
        "x" * 10_000,
        "a/" * 3000,
        "/dev/null",
        object(),
        Explosive(),
        Silent(),
        "\ud800",
        ["a"],
    ),
    "device": (None, 0, "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1.5", "cuda:０", "", "CPU", b"cpu", Explosive()),
    "engine": ("x", 3, "", True, b"onnxruntime", "tensorrt", "x" * 1_000_000, object(), Explosive()),
    "threads": (-1, 99_999, 1.0, "1", True, None, NAN, DIGITS_5000, [1], object(), Explosive()),
    "sessions": (0, -1, "4", 4.0, True, None, 10**9, DIGITS_5000, object(), Explosive()),
    "kept": (0, -1, "4", 4.0, True, None, 10**9, DIGITS_5000, object(), Explosive()),
    "low_memory": (1, None, "yes", Explosive()),
    "max_memory": (0, -1, 1, 1.5, True, "4G", NAN, -DIGITS_5000, object(), Explosive()),
    "check_hashes": (0, None, "no", Explosive()),
}


def rows(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{told(name, 20)} {type(value).__name__} {index}")
        for name, values in table.items()
        for index, value in enumerate(values)
    ]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return fake(FakeBackend())


@pytest.fixture(scope="module")
def wanted(pipeline: Pipeline) -> NDArray[np.float32]:
    latents: NDArray[np.float32] = pipeline.generate(seed=7, **LABELS).latents
    return latents


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline that takes prompts; its text encoder answers zeros."""
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    unigram(["a cat on the sea", "an old master"]).save(str(path))
    text = TextSpec(7, 512, 4, Precision.FP32)
    spec = replace(manifest().spec, conditioning=Conditioning.of_text(text.tokens, text.channels, sized=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ilf_trt.runtime.pipeline._tokenizer", lambda *_: Tokenizer(path, text))
        yield Pipeline.of(Bundle(path.parent, replace(manifest(), spec=spec, text=text)), FakeBackend())  # type: ignore[arg-type]


def assert_refused(call: Callable[[], object], *kinds: type[IlfError]) -> None:
    """A call raises one of `kinds` in one short line within SOON_S of this thread's own time."""
    begin = time.thread_time()
    with pytest.raises(kinds or InvalidRequest) as refused:
        call()
    assert time.thread_time() - begin < SOON_S
    message = str(refused.value)
    assert 0 < len(message) <= MESSAGE_CHARS
    assert message.isprintable()


def assert_serves(pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(pipeline.generate(seed=7, **LABELS).latents, wanted)


@pytest.mark.parametrize(("name", "value"), rows(GENERATE))
def test_generate_refuses(name: str, value: Any, pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    assert_refused(lambda: pipeline.generate(**{**LABELS, name: value}))
    assert_serves(pipeline, wanted)


@pytest.mark.parametrize(("name", "value"), rows(PROMPTS))
def test_generate_refuses_beside_a_text_encoder(name: str, value: Any, text_pipeline: Pipeline) -> None:
    served = text_pipeline.generate("a cat", seed=7).latents
    assert_refused(lambda: text_pipeline.generate(**{"prompt": "a cat", name: value}))
    np.testing.assert_array_equal(text_pipeline.generate("a cat", seed=7).latents, served)


@pytest.mark.parametrize(("name", "value"), rows(WARM_UP))
def test_warm_up_refuses(name: str, value: Any, pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    assert_refused(lambda: pipeline.warm_up(**{name: value}))
    assert_serves(pipeline, wanted)


@pytest.mark.parametrize(("name", "value"), rows(PLAN))
def test_plan_refuses(name: str, value: Any, pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    assert_refused(lambda: pipeline.plan(**{name: value}))
    assert_serves(pipeline, wanted)


@pytest.mark.parametrize(("name", "value"), rows(RUN))
def test_run_refuses(name: str, value: Any, pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    given: dict[str, Any] = {"graph": "cond", "arrays": {}, name: value}
    assert_refused(lambda: pipeline.run(**given), InvalidRequest, PortMismatch)
    assert_serves(pipeline, wanted)


@pytest.mark.parametrize(("name", "value"), rows(CLOSE))
def test_close_refuses_and_closes_nothing(
    name: str, value: Any, pipeline: Pipeline, wanted: NDArray[np.float32]
) -> None:
    assert_refused(lambda: pipeline.close(**{name: value}))
    assert_serves(pipeline, wanted)


@pytest.mark.parametrize(("name", "value"), rows(LOAD))
def test_load_refuses(name: str, value: Any, dit_bundle: Path) -> None:
    assert_refused(lambda: Pipeline.load(**{"path": dit_bundle, name: value}), InvalidRequest, BundleError)


def test_misuses_change_no_bit_of_real_graphs(dit_bundle: Path) -> None:
    with Pipeline.load(dit_bundle, threads=1, sessions=1, check_hashes=False) as pipeline:
        wanted = pipeline.generate(seed=7, **LABELS).latents
        for name, value in (("seed", 1.5), ("size", [8]), ("steps", 0), ("latents", LATENTS), ("class_labels", [99])):
            assert_refused(partial(pipeline.generate, **{**LABELS, name: value}))
        assert_serves(pipeline, wanted)


def test_a_misuse_in_low_memory_is_refused_before_anything_is_loaded() -> None:
    backends: list[FakeBackend] = []
    pipeline = low_memory(backends)
    for name in ("class_labels", "size", "seed", "latents", "timeout"):
        for value in (Explosive(), object()):
            assert_refused(partial(pipeline.generate, **{**LABELS, name: value}))
    assert backends == []


# --- any value at all

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.booleans(),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.sampled_from([1 << 63, 1 << 64, -(1 << 63)]),
    st.sampled_from([1, -1]).map(lambda sign: sign * DIGITS_5000),  # which has no repr to show
    st.sampled_from([np.int8(3), np.uint64(3), np.float16(2), np.float32("nan"), np.bool_(True), np.str_("3")]),
)
PLAIN = NUMBERS | st.none() | st.text(max_size=20) | st.binary(max_size=20)
ODD = st.one_of(
    st.sampled_from([Explosive, Silent, NoArray, Endless, object]).map(lambda kind: kind()),
    st.sampled_from([type, print, ..., slice(3)]),
)
ARRAYS = arrays(
    st.sampled_from(["i1", "u8", "f2", "f4", "f8", "c8", "?", "M8[s]", "U2", "O", "i4,f4"]),
    array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)
ANYTHING = st.recursive(
    PLAIN | ODD | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(iter)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
GENERATED = tuple(name for name in GENERATE if name.isidentifier())


def gives(kind: type, call: Callable[[], object]) -> None:
    """A call gives a `kind`, or raises an error of this package in one short line."""
    try:
        assert isinstance(call(), kind)
    except IlfError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()
    assert 0 < len(message) <= MESSAGE_CHARS


@pytest.mark.fuzz
@given(given=st.dictionaries(st.sampled_from(GENERATED), ANYTHING, max_size=3))
def test_generate_gives_a_result_or_an_error(
    given: dict[str, Any], pipeline: Pipeline, wanted: NDArray[np.float32]
) -> None:
    if callable(given.get("progress")):
        del given["progress"]  # what it raises comes out as it is
    gives(Result, lambda: pipeline.generate(**{**LABELS, **given}))
    assert_serves(pipeline, wanted)


@pytest.mark.fuzz
@given(value=ANYTHING, name=st.sampled_from(GENERATED))
def test_generate_gives_a_result_or_an_error_for_any_value_of_one_argument(
    value: Any, name: str, pipeline: Pipeline
) -> None:
    assume(name != "progress" or not callable(value))
    gives(Result, lambda: pipeline.generate(**{**LABELS, name: value}))


@pytest.mark.fuzz
@given(prompt=ANYTHING | st.lists(st.text(), max_size=3), negative=ANYTHING | st.text())
def test_any_prompts_give_a_result_or_an_error(prompt: Any, negative: Any, text_pipeline: Pipeline) -> None:
    gives(Result, lambda: text_pipeline.generate(prompt, negative_prompt=negative))


@pytest.mark.fuzz
@given(labels=ANYTHING | st.lists(NUMBERS, max_size=4) | ARRAYS)
def test_any_labels_give_a_result_or_an_error(labels: Any, pipeline: Pipeline) -> None:
    gives(Result, lambda: pipeline.generate(class_labels=labels))


@pytest.mark.fuzz
@given(given=st.fixed_dictionaries({}, optional=dict.fromkeys(PLAN, ANYTHING)))
def test_plan_gives_a_plan_or_an_error(given: dict[str, Any], pipeline: Pipeline) -> None:
    gives(StepPlan, lambda: pipeline.plan(**given))


@pytest.mark.fuzz
@given(pattern=st.text("0123456789,-: allfirstouter", max_size=20))
def test_any_pattern_gives_a_plan_or_an_error(pattern: str, pipeline: Pipeline) -> None:
    gives(StepPlan, lambda: pipeline.plan(feedback=pattern))


@pytest.mark.fuzz
@given(given=st.fixed_dictionaries({}, optional=dict.fromkeys(WARM_UP, ANYTHING)))
def test_warm_up_ends_or_gives_an_error(given: dict[str, Any], pipeline: Pipeline, wanted: NDArray[np.float32]) -> None:
    gives(type(None), lambda: pipeline.warm_up(**given))
    assert_serves(pipeline, wanted)


@pytest.mark.fuzz
@given(arrays=st.dictionaries(st.sampled_from(["times", "class_labels", "x"]), ANYTHING) | ANYTHING)
def test_run_gives_arrays_or_an_error(arrays: Any, pipeline: Pipeline) -> None:
    gives(dict, lambda: pipeline.run("cond", arrays))


@pytest.mark.fuzz
@given(name=st.sampled_from([name for name in LOAD if name != "path"]), value=ANYTHING)
def test_load_gives_an_error_for_any_value(name: str, value: Any, tmp_path: Path) -> None:
    """The folder is empty, so that no argument that fits loads anything."""
    with pytest.raises(IlfError) as refused:
        Pipeline.load(**{"path": tmp_path, name: value})
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= MESSAGE_CHARS


def test_a_subclass_of_a_list_counts_as_what_it_holds() -> None:
    """numpy would ask the subclass, which may never end, also inside of a list."""
    assert array_of("seeds", ([3], Endless([4]))).tolist() == [[3], [4]]
    assert array_of("seeds", Endless([5])).tolist() == [5]
