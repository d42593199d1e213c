"""Checkpoints and recipes of strangers: a flipped bit is noticed; what fits its digests loads soon, or is refused."""

import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt import load_ilf
from ilf_trt.errors import MESSAGE_CHARS, IlfError
from ilf_trt.train.checkpoints import Checkpoints
from ilf_trt.train.recipe import Recipe, read_table, recipe_names
from ilf_trt.train.weights import new_optimizer
from tests.fitting_digests import change_json
from tests.small_training import BASE, run_training, small_model, small_recipe

MOST_S, MOST_MIB = 5.0, 300.0

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 70),
    st.sampled_from((10**4, 10**9, 2**31, 2**63, -1, 0)),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(("", "x" * 5000, "../../..", "/dev/zero", "owner/name", "\x1b[31m\n", "3:4", "dit", "nan")),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=8), SCALARS, max_size=3))


def places(table: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of nested plain data."""
    if prefix:
        yield prefix
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for name, value in items:
        yield from places(value, (*prefix, name))


def put(table: Any, place: tuple[Any, ...], value: Any) -> None:
    for name in place[:-1]:
        table = table[name]
    table[place[-1]] = value


def soon(call: Callable[[], object]) -> bool:
    """Whether the call goes well; it must end in time and memory, and what it raises is of this package in one line."""
    begin_s, before_kib, message = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    try:
        call()
    except IlfError as error:
        message = str(error)
    assert message is None or ("\n" not in message and len(message) <= MESSAGE_CHARS)
    assert time.monotonic() - begin_s < MOST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024 < MOST_MIB
    return message is None


@pytest.fixture(scope="module")
def checkpoint(dit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(dit_checkpoint, tmp_path_factory.mktemp("hostile") / "copy"))


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with one checkpoint."""
    folder = tmp_path_factory.mktemp("stepped")
    run_training(folder, small_recipe(optimisation={"iterations": 2, "ema": 4.0}))
    return folder


def resume(folder: Path) -> dict[str, torch.Tensor]:
    """All that a training takes from a checkpoint, by name."""
    recipe = small_recipe(optimisation={"iterations": 2, "ema": 4.0})
    model, served = small_model(), small_model()
    optimizer = new_optimizer(model, recipe)
    checkpoints = Checkpoints(folder, recipe, BASE)
    state, _ = checkpoints.load(folder / "steps" / "00000002", model, optimizer, served_model=served)
    numbers = torch.tensor([state.iteration, state.loss_total, state.window_sum, state.window_count])
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    weights = {f"own.{name}": value for name, value in model.feedback.state_dict().items()}
    means = {f"mean.{name}": value for name, value in served.feedback.state_dict().items()}
    return {"state": numbers, **moments, **weights, **means}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flip(path: Path, bit: int) -> int:
    """Flip a bit of a file, counted round its end; the bit that it was."""
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


@contextmanager
def restored(path: Path) -> Iterator[Path]:
    """A file that has its content again when the block ends."""
    content = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(content)


def check_flipped(path: Path, bit: int, load: Callable[[], dict[str, torch.Tensor]]) -> None:
    """With a flipped bit, a load is refused or gives the same."""
    wanted, found = load(), []
    with restored(path):
        flip(path, bit)
        if soon(lambda: found.append(load())):
            assert same(found[0], wanted)


def check_replaced(path: Path, data: st.DataObject, load: Callable[[], object]) -> None:
    """With a value replaced and digests that fit, a load goes well or is refused."""
    place = data.draw(st.sampled_from(list(places(json.loads(path.read_text())))))
    value = data.draw(VALUES)
    with restored(path):
        change_json(path, lambda table: put(table, place, value))
        soon(load)


@pytest.mark.fuzz
@given(file=st.sampled_from(("ilf.json", "ilf.safetensors")), bit=st.integers(0, 1 << 40))
def test_a_flipped_bit_of_a_checkpoint_never_gives_another_model(checkpoint: Path, file: str, bit: int) -> None:
    check_flipped(checkpoint / file, bit, lambda: load_ilf(checkpoint).feedback.state_dict())


@pytest.mark.fuzz
@given(
    file=st.sampled_from(("state.json", "ilf.json", "ilf.safetensors", "raw.safetensors", "optimizer.safetensors")),
    bit=st.integers(0, 1 << 40),
)
def test_a_flipped_bit_of_a_training_never_gives_another_training(stepped: Path, file: str, bit: int) -> None:
    check_flipped(stepped / "steps" / "00000002" / file, bit, lambda: resume(stepped))


@pytest.mark.fuzz
@given(data=st.data())
def test_facts_of_an_attacker_load_soon_or_are_refused(checkpoint: Path, data: st.DataObject) -> None:
    check_replaced(checkpoint / "ilf.json", data, lambda: load_ilf(checkpoint))


@pytest.mark.fuzz
@given(data=st.data())
def test_a_state_of_an_attacker_resumes_soon_or_is_refused(stepped: Path, data: st.DataObject) -> None:
    check_replaced(stepped / "steps" / "00000002" / "state.json", data, lambda: resume(stepped))


@pytest.mark.fuzz
@given(data=st.data())
def test_a_recipe_of_an_attacker_is_read_soon_or_refused(data: st.DataObject) -> None:
    table = read_table(data.draw(st.sampled_from(recipe_names())))
    for _ in range(data.draw(st.integers(1, 3))):
        put(table, data.draw(st.sampled_from(list(places(table)))), data.draw(VALUES))
    soon(lambda: Recipe.from_table(table))


NAMES = sorted({".".join(map(str, place)) for name in recipe_names() for place in places(read_table(name))})


@pytest.mark.fuzz
@given(name=st.sampled_from(NAMES) | st.text(max_size=20), text=st.text(max_size=40) | SCALARS.map(str))
def test_any_change_of_a_recipe_is_made_or_refused(name: str, text: str) -> None:
    soon(lambda: Recipe.read("demo", [f"{name}={text}"]))


@pytest.mark.parametrize(
    "text",
    ["0x" + "f" * 400, "1" * 400, "1e400", "[" * 10**5, "{a=" * 10**4, '"' + "x" * 10**6 + '"', "nan", "1979-05-27"],
    ids=["hex", "digits", "exponent", "brackets", "tables", "text", "nan", "date"],
)
def test_a_number_that_is_none_is_refused_in_one_line(text: str) -> None:
    assert not soon(lambda: Recipe.read("demo", [f"optimisation.lr={text}"]))


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 10**5, "a = 1\na = 2", "x" * 10**5, "a." * 10**4 + "b = 1", "seed = " + "9" * 5000, "\0"],
    ids=["brackets", "twice", "no value", "sections", "digits", "null"],
)
def test_a_recipe_file_that_is_no_plain_toml_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert not soon(lambda: Recipe.read(str(path)))


@pytest.mark.parametrize("name", ["x" * 10**4, "a\0b", "/dev/zero", "."])
def test_a_name_that_no_recipe_can_have_is_refused(name: str) -> None:
    assert not soon(lambda: Recipe.read(name))


@pytest.mark.parametrize("source", ["x" * 4096, "a\0b", "/dev/zero", "\x1b[31m", "..", "owner/" + "n" * 200])
def test_a_base_that_no_folder_can_be_is_refused(checkpoint: Path, source: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    change_json(copy / "ilf.json", lambda facts: facts["base"].update(source=source))
    assert not soon(lambda: load_ilf(copy))


def test_not_every_mutation_is_refused(checkpoint: Path) -> None:
    """Else the properties above would hold of a loader that refuses everything."""
    assert soon(lambda: load_ilf(checkpoint))
    assert soon(lambda: Recipe.read("demo", ["optimisation.lr=1e-3"]))
    assert math.isclose(Recipe.read("demo", ["optimisation.lr=1e-3"]).optimisation.lr, 1e-3)
