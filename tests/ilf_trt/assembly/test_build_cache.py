"""The build cache's store: what comes back, what is refused, what goes, and several builds at once."""

import fcntl
import hashlib
import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.assembly import build_cache
from ilf_trt.assembly.build_cache import DAY_S, BuildCache
from ilf_trt.assembly.seal import Seal
from ilf_trt.files import copy_open_file

KEY = "5" * 64
NOTE = {"graph": "pre", "precision": "fp16"}
ANOTHER_USER = 12345
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


def test_an_edit_of_one_bundle_reaches_neither_the_cache_nor_another_bundle(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], tmp_path: Path
) -> None:
    store.put(KEY, made, NOTE)
    store.take(KEY, places)
    for path in (*made.values(), *places.values()):
        with path.open("r+b") as file:
            file.write(b"edited in its place")
    later = {name: tmp_path / "later" / name for name in made}
    assert store.take(KEY, later) is not None
    assert [path.read_text() for path in later.values()] == [f"{name} of the first build" for name in made]


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
        lambda folder: (folder / "entry.json").write_text('{"files": {}, "note": {}, "seal": ""}'),
        lambda folder: (folder / "entry.json").write_bytes(b"[" * 100_000),
    ],
    ids=["another engine", "no report", "no facts", "empty facts", "a list", "a wrong type", "no files", "deep"],
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
    assert "is removed and made again" in caplog.text
    assert not entry(store).exists()
    assert [place.exists() for place in places.values()] == [False, False]
    store.put(KEY, made, NOTE)
    assert store.take(KEY, places) is not None


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "deep/../../engine", "engine\x1b[2J"])
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


def test_an_entry_that_vanishes_while_it_is_taken_is_taken_whole(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_a_prune(file: BinaryIO, place: Path) -> None:
        store.prune()
        copy_open_file(file, place)

    store.put(KEY, made, NOTE)
    monkeypatch.setattr(build_cache, "copy_open_file", after_a_prune)
    assert store.take(KEY, places) is not None
    assert store.entries() == ()
    assert [place.read_text() for place in places.values()] == [f"{name} of the first build" for name in made]


def test_an_entry_that_vanishes_before_it_is_opened_is_not_taken(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_a_prune() -> Seal:
        store.prune()
        return of_user()

    store.put(KEY, made, NOTE)
    of_user = Seal.of_user
    monkeypatch.setattr(Seal, "of_user", after_a_prune)
    assert store.take(KEY, places) is None
    assert [place.exists() for place in places.values()] == [False, False]


# --- entries of somebody else


def copied_from_another_key(store: BuildCache, made: dict[str, Path]) -> None:
    store.put("6" * 64, made, NOTE)
    (entry(store, "6" * 64)).rename(entry(store))


def edited(store: BuildCache, made: dict[str, Path]) -> None:
    store.put(KEY, {"engine": made["report"], "report": made["report"]}, NOTE)
    forge(entry(store), made, seal=json.loads((entry(store) / "entry.json").read_text())["seal"])


def made_by_another_user(store: BuildCache, made: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(store.folder.parent / "another user"))
        store.put(KEY, made, NOTE)


def sealed_by_hand(store: BuildCache, made: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    forge(entry(store), made, seal="0" * 64)


def sealed_in_other_letters(store: BuildCache, made: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    forge(entry(store), made, seal="\ud800é")


def from_version_01(store: BuildCache, made: dict[str, Path]) -> None:
    store.put(KEY, made, NOTE)
    forge(entry(store), made, seal=None)


def forge(folder: Path, files: dict[str, Path], seal: str | None) -> None:
    """What anybody can write: files, and their true hashes and sizes."""
    facts = {}
    for name, path in files.items():
        rewrite(folder / name, path.read_text())
        content = path.read_bytes()
        facts[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    record = {"files": facts, "note": NOTE} | ({} if seal is None else {"seal": seal})
    (folder / "entry.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "plant",
    [
        copied_from_another_key,
        edited,
        made_by_another_user,
        sealed_by_hand,
        sealed_in_other_letters,
        from_version_01,
    ],
)
def test_a_consistent_entry_that_this_user_did_not_make_for_this_key_is_evicted(
    plant: Callable[[BuildCache, dict[str, Path]], None],
    store: BuildCache,
    made: dict[str, Path],
    places: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plant(store, made)
    assert (entry(store) / "entry.json").is_file()
    assert store.take(KEY, places) is None
    assert f"the cached build {entry(store)} is removed and made again: " in caplog.text
    assert not entry(store).exists()
    assert [place.exists() for place in places.values()] == [False, False]


@pytest.mark.parametrize("name", ["engine", "entry.json", "."])
def test_a_pipe_in_the_place_of_a_file_or_an_entry_is_evicted_at_once(
    name: str, store: BuildCache, made: dict[str, Path], places: dict[str, Path]
) -> None:
    store.put(KEY, made, NOTE)
    place = entry(store) / name
    shutil.rmtree(place) if name == "." else place.unlink()
    os.mkfifo(place)
    assert store.take(KEY, places) is None
    assert not os.path.lexists(entry(store))


def test_an_entry_that_is_a_link_goes_and_what_it_leads_to_stays(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], tmp_path: Path
) -> None:
    store.put("6" * 64, made, NOTE)
    entry(store, "6" * 64).rename(tmp_path / "elsewhere")
    entry(store).symlink_to(tmp_path / "elsewhere")
    assert store.take(KEY, places) is None
    assert not os.path.lexists(entry(store))
    assert (tmp_path / "elsewhere" / "engine").is_file()


# --- folders that others can write


def open_to_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.chmod(path.stat().st_mode | 0o002)
    return "others can write it; run chmod -R go-w on it"


def open_to_the_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.chmod(path.stat().st_mode | 0o020)
    return "others can write it; run chmod -R go-w on it"


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if os.geteuid() == 0:
        os.chown(path, ANOTHER_USER, -1)
    else:
        owner = path.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    return "belongs to user"


@pytest.mark.parametrize("name", ["", "entries"], ids=["cache", "entries"])
@pytest.mark.parametrize("share", [open_to_all, open_to_the_group, of_another_user])
def test_a_cache_that_others_can_write_is_not_used_and_this_is_said_once(
    share: Callable[[Path, pytest.MonkeyPatch], str],
    name: str,
    store: BuildCache,
    made: dict[str, Path],
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.put(KEY, made, NOTE)
    reason = share(store.folder / name, monkeypatch)
    assert store.take(KEY, places) is None
    store.put("6" * 64, made, NOTE)
    assert [path.name for path in (store.folder / "entries").iterdir()] == [KEY]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"the build cache {store.folder} is not used: {store.folder / name}" in caplog.text
    assert reason in caplog.text
    for look in (store.entries, store.prune, lambda: store.find(KEY)):
        with pytest.raises(PermissionError, match=reason):
            look()


@pytest.mark.parametrize("name", ["", "entry.json", "engine"])
def test_an_entry_that_others_can_write_is_evicted(
    name: str, store: BuildCache, made: dict[str, Path], places: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, made, NOTE)
    (entry(store) / name).chmod(0o777)
    assert store.take(KEY, places) is None
    assert "has mode 0777, others can write it" in caplog.text
    assert not entry(store).exists()


def test_a_cache_behind_a_link_is_judged_by_its_real_place(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path], tmp_path: Path
) -> None:
    store.put(KEY, made, NOTE)
    (tmp_path / "link").symlink_to(store.folder)
    assert BuildCache(tmp_path / "link").take(KEY, places) is not None
    store.folder.chmod(0o777)
    assert BuildCache(tmp_path / "link").take(KEY, places) is None


def test_what_the_cache_makes_is_private_under_any_umask(
    store: BuildCache, made: dict[str, Path], places: dict[str, Path]
) -> None:
    umask = os.umask(0)
    try:
        store.put(KEY, made, NOTE)
        with store.timings("gpu.cache"):
            pass
        assert store.take(KEY, places) is not None
    finally:
        os.umask(umask)
    assert [path for path in (store.folder, *store.folder.rglob("*")) if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("plant", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_foreign_timings_go(
    plant: Callable[[Path], object], store: BuildCache, caplog: pytest.LogCaptureFixture
) -> None:
    with store.timings("gpu.cache") as path:
        assert path is not None
        plant(path)
    with store.timings("gpu.cache") as path:
        assert path is not None
        assert not os.path.lexists(path)
    assert "the cached timings are removed and made again" in caplog.text


# --- an entry that is read in its place


def test_what_was_made_in_the_cache_is_found_there(store: BuildCache) -> None:
    assert store.find(KEY) is None
    with store.making(KEY, NOTE) as draft:
        (draft / "deep" / "er").mkdir(parents=True)
        (draft / "deep" / "er" / "file").write_text("x")
    folder = store.find(KEY)
    assert folder is not None
    assert (folder / "deep" / "er" / "file").read_text() == "x"
    assert store.entries()[0].size_bytes == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "file").write_text("y"),
        lambda folder: (folder / "deep" / "file").unlink(),
        lambda folder: (folder / "deep" / "other").write_text(""),
        lambda folder: (folder / "deep" / "other").symlink_to(folder),
        lambda folder: (folder / "deep").chmod(0o770),
    ],
    ids=["edited", "gone", "added", "linked", "shared"],
)
def test_what_was_changed_there_is_evicted(damage: Callable[[Path], object], store: BuildCache) -> None:
    with store.making(KEY, NOTE) as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "file").write_text("x")
    damage(entry(store))
    assert store.find(KEY) is None
    assert not entry(store).exists()


def test_the_first_of_two_that_make_an_entry_wins(store: BuildCache) -> None:
    with store.making(KEY, NOTE) as slow:
        (slow / "file").write_text("slow")
        with store.making(KEY, NOTE) as fast:
            (fast / "file").write_text("fast")
    folder = store.find(KEY)
    assert folder is not None
    assert (folder / "file").read_text() == "fast"


def test_an_error_in_the_block_makes_no_entry(store: BuildCache) -> None:
    with pytest.raises(FileExistsError), store.making(KEY, NOTE) as draft:
        draft.mkdir()
    assert store.find(KEY) is None


# --- any damage at all


@pytest.mark.fuzz
@given(
    file=st.sampled_from(["entry.json", "engine", "report"]),
    change=st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.just(0)),
        st.tuples(st.just("swap"), st.sampled_from(["entry.json", "engine", "report"]), st.sampled_from([0, 1])),
    ),
)
def test_whatever_is_changed_in_an_entry_never_gives_another_file(
    file: str, change: tuple[str, Any, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("fuzz")
    store = BuildCache(place / "cache")
    made = {}
    for number in range(2):
        for name in ("engine", "report"):
            path = place / f"{name}{number}"
            path.write_text(f"{name} of build {number}")
            made[name, number] = path
        store.put(str(number), {name: made[name, number] for name in ("engine", "report")}, NOTE)
    victim, (kind, first, second) = entry(store, "0") / file, change
    content = bytearray(victim.read_bytes())
    if kind == "flip":
        content[first % len(content)] ^= 1 << second
    elif kind == "cut":
        del content[first % len(content) :]
    else:
        content[:] = (entry(store, str(second)) / first).read_bytes()
    unchanged = bytes(content) == victim.read_bytes()
    victim.write_bytes(content)
    into = {name: place / "taken" / name for name in ("engine", "report")}
    taken = store.take("0", into)
    assert taken is not None or not unchanged
    for name, path in into.items():
        assert not path.exists() if taken is None else path.read_bytes() == made[name, 0].read_bytes()
    shutil.rmtree(place)


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
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"the build cache {store.folder} is not used" in caplog.text
    assert "Not a directory; the build goes on without" in caplog.text


@pytest.mark.parametrize("home", [None, "/proc/none"], ids=["no home", "an unwritable home"])
def test_without_a_place_for_the_key_the_build_goes_on_and_is_told_why(
    home: str | None,
    store: BuildCache,
    made: dict[str, Path],
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    store.put(KEY, made, NOTE)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert store.take(KEY, places) is None
    store.put("6" * 64, made, NOTE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert ("set HOME or XDG_STATE_HOME" if home is None else "/proc/none") in caplog.text
    assert entry(store).is_dir()


def test_a_full_disk_while_an_entry_is_taken_is_passed_on_and_the_entry_stays(
    store: BuildCache, made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, made, NOTE)
    (tmp_path / "engine").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        store.take(KEY, {"engine": tmp_path / "engine"})
    assert caplog.records == []
    assert entry(store).is_dir()


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
