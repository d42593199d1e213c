"""Whole-or-nothing writing: what a reader sees, what a failure leaves, and what a sweep removes."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from ilf_trt.files import (
    drop_drafts,
    remove_folder,
    sweep,
    sweep_folder,
    whole_file,
    whole_folder,
    whole_link,
    write_whole,
)

NO_PROCESS = 2**22 + 1  # above the largest process id of Linux


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_name_once_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with whole_folder(place, replace=False) as draft:
        (draft / "file").write_text("x")
        assert not place.exists()
    assert (place / "file").read_text() == "x"
    assert names(place.parent) == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_failure_half_way_leaves_the_old_folder_and_no_draft(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "b"
    place.mkdir()
    (place / "file").write_text("old")

    def fails() -> None:
        with whole_folder(place, replace=True) as draft:
            (draft / "file").write_text("new")
            raise error

    with pytest.raises(error):
        fails()
    assert names(tmp_path) == ["b"]
    assert (place / "file").read_text() == "old"


def test_a_folder_replaces_another_only_if_it_may(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with whole_folder(tmp_path / "b", replace=True) as draft:
            (draft / "file").write_text(content)
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "b", replace=False):
        pass
    assert (tmp_path / "b" / "file").read_text() == "new"
    assert names(tmp_path) == ["b"]


def test_the_content_is_on_the_disk_before_the_folder_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.partition('.partial')[0]}")
        fsync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        calls.append(f"rename {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with whole_folder(tmp_path / "place", replace=True, sync=True) as draft:
        (draft / "file").write_text("x")
    assert calls == ["sync file", "sync .place", "rename place", f"sync {tmp_path.name}"]


def test_a_folder_is_out_of_sight_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "00000001"
    place.mkdir()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(place)
    assert not place.exists()


def test_a_file_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("old")

    def fails() -> None:
        with whole_file(place) as draft:
            draft.write_text("new")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fails()
    assert place.read_text() == "old"
    with whole_file(place) as draft:
        draft.write_text("new")
        draft.chmod(0o600)
    assert place.read_text() == "new"
    (tmp_path / "plain").touch()
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["file", "plain"]


def test_a_link_moves_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        whole_link(tmp_path / "link", Path(target))
        assert (tmp_path / "link").readlink() == Path(target)
    assert names(tmp_path) == ["link"]


def test_a_sweep_removes_the_drafts_of_processes_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    for process in (NO_PROCESS, os.getppid()):
        (tmp_path / f".a.partial-0000000a-{process}").mkdir()
        (tmp_path / f".a.partial-0000000b-{process}").write_text("")
        (tmp_path / f".a.partial-0000000c-{process}").symlink_to("whole")
    (tmp_path / f".b.partial-0000000a-{NO_PROCESS}").mkdir()
    living = [f".a.partial-0000000{letter}-{os.getppid()}" for letter in "abc"]
    sweep(tmp_path / "a")
    assert names(tmp_path) == sorted([*living, f".b.partial-0000000a-{NO_PROCESS}", "whole"])
    sweep_folder(tmp_path)
    assert names(tmp_path) == sorted([*living, "whole"])


def test_a_sweep_removes_drafts_of_versions_that_did_not_name_the_process(tmp_path: Path) -> None:
    for suffix in ("1a2b3c4d", "12345678"):
        (tmp_path / f".00000002.partial-{suffix}").mkdir()
    sweep_folder(tmp_path)
    assert names(tmp_path) == []


def test_a_sweep_leaves_a_draft_that_is_being_written(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a", replace=False) as draft:
        sweep(tmp_path / "a")
        assert draft.is_dir()


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    """A limit of file sizes refuses a write half-way, as a full disk does."""
    place = tmp_path / "a.png"
    write_whole(place, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(place, bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert place.read_bytes() == b"old"
    assert names(tmp_path) == ["a.png"]


def test_a_file_takes_the_drafts_of_killed_processes_with_it(tmp_path: Path) -> None:
    (tmp_path / f".a.png.partial-12345678-{NO_PROCESS}").touch()
    write_whole(tmp_path / "a.png", b"new")
    assert names(tmp_path) == ["a.png"]


def test_a_file_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("far/a.png")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "far" / "a.png").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_what_an_interrupt_left_between_two_cleanups_is_dropped(tmp_path: Path) -> None:
    file, folder = whole_file(tmp_path / "a"), whole_folder(tmp_path / "b", replace=False)
    drafts = [file.__enter__(), folder.__enter__()]  # and no __exit__
    assert all(draft.exists() for draft in drafts)
    drop_drafts()
    assert names(tmp_path) == []
    del file, folder
    with whole_file(tmp_path / "a") as draft:
        draft.write_text("x")
    drop_drafts()
    assert names(tmp_path) == ["a"]
