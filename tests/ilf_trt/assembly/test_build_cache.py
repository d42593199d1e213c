"""The build cache's store: what comes back, what is refused, what goes, and several builds at once."""

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ilf_trt.assembly.build_cache import DAY_S, BuildCache

KEY = "5" * 64
NOTE = {"graph": "pre", "precision": "fp16"}
START_S = 60.0  # until another process has done its work, on a busy machine
WRITERS = 4
# Puts one key many times, of files that differ from process to process.
PUTS = """
import sys
from pathlib import Path
from ilf_trt.assembly.build_cache import BuildCache
store, number = BuildCache(Path(sys.argv[1])), sys.argv[2]
files = {name: Path(sys.argv[1]).parent / f"{number}-{name}" for name in ("engine", "report")}
for name, path in files.items():
    path.write_text(number * 1000)
for turn in range(50):
    store.put(f"{turn:064}", files, {"writer": number})
"""


@pytest.fixture
def store(tmp_path: Path) -> BuildCache:
    return BuildCache(tmp_path / "cache")


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """Files of a build, as a draft holds them."""
    files = {name: tmp_path / "draft" / name for name in ("engine", "report")}
    for name, path in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} of the first build")
    return files


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Where another build wants them."""
    return {name: tmp_path / "other" / "deep" / name for name in ("engine", "report")}


def entry(store: BuildCache, key: str = KEY) -> Path:
    return store.folder / "entries" / key


def rewrite(path: Path, text: str) -> None:
    """Another file under the same name, so that what it was linked to stays as it was."""
    path.unlink()
    path.write_text(text)


# --- put and take


def test_what_was_put_is_taken(store: BuildCache, made: dict[str, Path], places: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    taken = store.take(KEY, places)
    assert taken is not None
    assert (taken.key, taken.note) == (KEY, NOTE)
    assert taken.size_bytes == sum(path.stat().st_size for path in made.values())
    assert [places[name].read_text() for name in made] == [path.read_text() for path in made.values()]


def test_what_was_not_put_is_not_there(store: BuildCache, places: dict[str, Path]) -> None:
    assert store.take(KEY, places) is None
    assert not store.folder.exists()
    assert not places["engine"].parent.exists()


def test_files_are_linked_and_not_copied(store: BuildCache, made: dict[str, Path], places: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    store.take(KEY, places)
    for name, path in made.items():
        assert path.samefile(entry(store) / name)
        assert path.samefile(places[name])


def test_a_graphs_weights_are_copied_since_onnx_refuses_a_file_of_two_names(store: BuildCache, tmp_path: Path) -> None:
    weights = tmp_path / "pre.onnx.data"
    weights.write_text("weights")
    store.put(KEY, {"weights": weights}, NOTE)
    place = tmp_path / "other" / "pre.onnx.data"
    assert store.take(KEY, {"weights": place}) is not None
    assert place.read_text() == "weights"
    assert [path.stat().st_nlink for path in (weights, place, entry(store) / "weights")] == [1, 1, 1]


def test_where_no_link_can_be_files_are_copied(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    store.put(KEY, made, NOTE)
    assert store.take(KEY, places) is not None
    assert places["engine"].read_text() == made["engine"].read_text()
    assert not places["engine"].samefile(made["engine"])


def test_a_key_that_is_there_stays_as_it_is(store: BuildCache, made: dict[str, Path], places: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    rewrite(made["engine"], "engine of the second build")
    store.put(KEY, made, {"graph": "second"})
    taken = store.take(KEY, places)
    assert taken is not None
    assert taken.note == NOTE
    assert places["engine"].read_text() == "engine of the first build"


def test_a_file_that_was_not_put_cannot_be_taken(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path]
) -> None:
    store.put(KEY, {"engine": made["engine"]}, NOTE)
    assert store.take(KEY, places) is None


def test_a_take_counts_as_a_use(store: BuildCache, made: dict[str, Path], places: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    os.utime(entry(store) / "entry.json", (0, 0))
    assert store.entries()[0].used_s == 0
    store.take(KEY, places)
    assert time.time() - store.entries()[0].used_s < START_S


def test_a_store_that_can_only_be_read_is_read(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    store.put(KEY, made, NOTE)
    monkeypatch.setattr(os, "utime", refuse)
    assert store.take(KEY, places) is not None
    assert places["engine"].exists()


# --- damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: rewrite(folder / "engine", "other"),
        lambda folder: (folder / "report").unlink(),
        lambda folder: (folder / "entry.json").unlink(),
        lambda folder: (folder / "entry.json").write_text(""),
        lambda folder: (folder / "entry.json").write_text("[1]"),
        lambda folder: (folder / "entry.json").write_text('{"files": {"engine": 1}}'),
        lambda folder: (folder / "entry.json").write_text('{"files": {}, "note": {}}'),
    ],
    ids=["another engine", "no report", "no facts", "empty facts", "a list", "facts of a wrong type", "no files"],
)
def test_a_damaged_entry_goes_and_can_be_put_again(
    damage: Callable[[Path], object],
    store: BuildCache,
    made: dict[str, Path],
    places: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.put(KEY, made, NOTE)
    damage(entry(store))
    with caplog.at_level(logging.WARNING):
        assert store.take(KEY, places) is None
    assert "is damaged; the build makes it again" in caplog.text
    assert not entry(store).exists()
    assert [place.exists() for place in places.values()] == [False, False]
    store.put(KEY, made, NOTE)
    assert store.take(KEY, places) is not None


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "deep/engine"])
def test_an_entry_that_names_a_file_outside_of_it_is_refused(
    name: str, store: BuildCache, made: dict[str, Path], tmp_path: Path
) -> None:
    store.put(KEY, made, NOTE)
    facts = json.loads((entry(store) / "entry.json").read_text())
    facts["files"][name] = facts["files"]["engine"]
    (entry(store) / "entry.json").write_text(json.dumps(facts))
    assert store.entries() == ()
    assert store.take(KEY, {"engine": tmp_path / "taken"}) is None
    assert not (tmp_path / "taken").exists()


def test_an_entry_that_vanishes_while_it_is_taken_is_not_taken_in_part(
    store: BuildCache,
    made: dict[str, Path],
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = os.link

    def vanish(source: Path, place: Path) -> None:
        link(source, place)
        shutil.rmtree(entry(store))  # as another process's prune

    store.put(KEY, made, NOTE)
    monkeypatch.setattr(os, "link", vanish)
    assert store.take(KEY, places) is None
    assert [place.exists() for place in places.values()] == [False, False]
    assert "cannot be used" in caplog.text


# --- a store that cannot be written


def test_what_cannot_be_kept_is_warned_about_and_no_more(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = BuildCache(tmp_path / "file" / "cache")
    store.put(KEY, made, NOTE)
    with store.timings("gpu.cache") as path:
        assert path is None
    assert store.entries() == ()
    assert store.prune() == ()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "cannot be written" in caplog.text


def test_a_file_that_is_not_there_leaves_no_half_of_an_entry(store: BuildCache, made: dict[str, Path]) -> None:
    made["report"].unlink()
    store.put(KEY, made, NOTE)
    assert store.entries() == ()
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


# --- what goes


@pytest.fixture
def aged(store: BuildCache, made: dict[str, Path]) -> BuildCache:
    """Entries of equal size, named by the days since their last use."""
    for days in (100, 1, 10):
        store.put(str(days), {"engine": made["engine"]}, NOTE)
        used_s = time.time() - days * DAY_S
        os.utime(entry(store, str(days)) / "entry.json", (used_s, used_s))
    return store


def left(store: BuildCache) -> list[str]:
    return [found.key for found in store.entries()]


def test_entries_come_last_used_first(aged: BuildCache) -> None:
    assert left(aged) == ["1", "10", "100"]


def test_the_old_go(aged: BuildCache) -> None:
    assert [found.key for found in aged.prune(max_age_s=30 * DAY_S)] == ["100"]
    assert left(aged) == ["1", "10"]


def test_the_least_recently_used_go_until_the_rest_fits(aged: BuildCache) -> None:
    size = aged.entries()[0].size_bytes
    assert [found.key for found in aged.prune(max_bytes=2 * size)] == ["100"]
    assert [found.key for found in aged.prune(max_bytes=2 * size - 1)] == ["10"]


def test_an_older_entry_does_not_outlive_a_newer_one_for_its_size(
    aged: BuildCache, made: dict[str, Path], tmp_path: Path
) -> None:
    size = aged.entries()[0].size_bytes
    (tmp_path / "large").write_bytes(b"x" * size * 10)
    aged.put("5", {"engine": tmp_path / "large"}, NOTE)
    used_s = time.time() - 5 * DAY_S
    os.utime(entry(aged, "5") / "entry.json", (used_s, used_s))
    aged.prune(max_bytes=3 * size)
    assert left(aged) == ["1"]


def test_with_no_limit_everything_goes(aged: BuildCache) -> None:
    with aged.timings("gpu.cache") as path:
        assert path is not None
        path.write_text("timings")
    (entry(aged, "1") / "entry.json").write_text("")
    assert {found.key for found in aged.prune()} == {"10", "100"}
    assert left(aged) == []
    assert [path for path in aged.folder.rglob("*") if path.is_file()] == []


def test_with_a_limit_timings_stay_and_what_cannot_be_read_goes(aged: BuildCache) -> None:
    with aged.timings("gpu.cache") as path:
        assert path is not None
        path.write_text("timings")
    (entry(aged, "1") / "entry.json").write_text("")
    assert aged.prune(max_age_s=1000 * DAY_S) == ()
    assert path.read_text() == "timings"
    assert not entry(aged, "1").exists()


def test_drafts_of_killed_builds_go_and_those_of_living_builds_stay(store: BuildCache) -> None:
    entries = store.folder / "entries"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, pid in (("dead", dead.pid), ("living", 1)):
        (entries / f".{name}.partial-0123abcd-{pid}").mkdir(parents=True)
    assert store.entries() == ()
    store.prune(max_age_s=0)
    assert [path.name for path in entries.iterdir()] == [".living.partial-0123abcd-1"]


def test_files_of_a_bundle_outlive_the_store(store: BuildCache, made: dict[str, Path], places: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    store.take(KEY, places)
    store.prune()
    assert [places[name].read_text() for name in made] == [path.read_text() for path in made.values()]


# --- several builds at once


def test_builds_that_put_the_same_keys_at_once_leave_whole_entries(store: BuildCache, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", PUTS, str(store.folder), str(number)]) for number in range(WRITERS)
    ]
    assert [writer.wait(START_S) for writer in writers] == [0] * WRITERS
    assert len(store.entries()) == 50
    for turn in range(50):
        places = {name: tmp_path / str(turn) / name for name in ("engine", "report")}
        taken = store.take(f"{turn:064}", places)
        assert taken is not None
        assert {place.read_text() for place in places.values()} == {taken.note["writer"] * 1000}
    assert [path.name for path in store.folder.iterdir()] == ["entries"]


def test_timings_are_held_by_one_build_at_a_time(store: BuildCache) -> None:
    entered = threading.Event()

    def second() -> None:
        with store.timings("gpu.cache"):
            entered.set()

    with store.timings("gpu.cache") as path:
        assert path == store.folder / "timing" / "gpu.cache"
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.2)
    assert entered.wait(START_S)
    waiting.join()


def test_timings_of_two_gpus_are_held_apart(store: BuildCache) -> None:
    with store.timings("one.cache") as one, store.timings("two.cache") as two:
        assert one != two


def test_timings_that_cannot_be_locked_are_done_without(
    store: BuildCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")  # a network file system

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store.timings("gpu.cache") as path:
        assert path is None
    assert "No locks available" in caplog.text


def test_an_error_while_timings_are_held_is_passed_on_and_lets_them_go(store: BuildCache) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), store.timings("gpu.cache"):
        raise RuntimeError("in the middle")
    with store.timings("gpu.cache") as path:
        assert path is not None
