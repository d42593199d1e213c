"""Commands in odd surroundings: no home, a terminal that shows little or nothing, names that are made to deceive."""

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.contract.bundle import MANIFEST_FILE
from tests.conftest import FAILED, Ran, Run
from tests.manifests import change_manifest

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "ilf_trt.cli")
PLAN = ("plan", "--blocks", "28", "--loop", "8:19", "--steps", "10")
REFUSED = ("plan", "--blocks", "x", "--steps", "3")
STRANGER = ("unshare", "--map-user=54321", "--map-group=54321")
"""A user of whom the system knows no name and no home folder; it reads the files that we read."""

COLOUR = re.compile(rb"\x1b\[[0-9;]*(3|4|9|10)[0-8][0-9;]*m")
BELL, ESCAPE = "\x07", "\x1b"
HOSTILE = f"{ESCAPE}]0;title{BELL}{ESCAPE}[2J[bold red]x[/][link=http://a]\u202e\n[/nothing]"
TIMEOUT_S = 60


def start(tokens: tuple[object, ...], environment: dict[str, str], *, before: tuple[str, ...] = (), **how: Any) -> Any:
    """A command in an environment that holds nothing else."""
    return subprocess.run(
        [*before, *COMMAND, *map(str, tokens)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        timeout=TIMEOUT_S,
        check=False,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how,
    )


def ran(tokens: tuple[object, ...], environment: dict[str, str], **how: Any) -> Ran:
    done = start(tokens, environment, **how)
    return Ran(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, two at a time."""
    with ThreadPoolExecutor(2) as threads:
        return [call.result() for call in [threads.submit(call) for call in calls]]


@cache
def can_be_a_stranger() -> bool:
    if shutil.which(STRANGER[0]) is None:
        return False
    return subprocess.run([*STRANGER, "true"], capture_output=True, check=False, timeout=TIMEOUT_S).returncode == 0


@pytest.mark.slow
def test_a_user_without_a_name_and_a_home_is_served_or_told_what_to_pass(tmp_path: Path) -> None:
    if not can_be_a_stranger():
        pytest.skip("this system lets nobody take another user id")
    picture = tmp_path / "a.png"
    plan, listed, told, built = at_once(
        lambda: ran(PLAN, {}, before=STRANGER),
        lambda: ran(("cache", "ls", "--cache-dir", tmp_path / "cache"), {}, before=STRANGER),
        lambda: ran(("generate", "demo", "--labels", 1, "-o", picture), {}, before=STRANGER),
        lambda: ran(("build", "--checkpoint", "demo", "-o", tmp_path / "demo.ilf"), {}, before=STRANGER),
    )
    assert (plan.code, plan.err) == (listed.code, listed.err) == (0, "")
    for refused in (told, built):
        refused.refused("no home folder", "HOME", "--cache-dir FOLDER")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"HOME": str(tmp_path / "file" / "home")}
    listed, told = at_once(
        lambda: ran(("cache", "ls"), home),
        lambda: ran(("generate", "demo", "--labels", 1, "-o", tmp_path / "a.png"), home),
    )
    assert (listed.code, listed.err) == (0, "")
    told.refused("file/home", "--cache-dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_terminal_of_ascii_gets_ascii(tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    help_, plan, refused = at_once(
        lambda: start(("plan", "--help"), ascii_only),
        lambda: start(PLAN, ascii_only),
        lambda: start(("inspect", tmp_path / "日本 é"), ascii_only),
    )
    for done, code in ((help_, 0), (plan, 0), (refused, FAILED)):
        assert done.returncode == code
        assert (done.stdout + done.stderr).isascii()
        assert b"Traceback" not in done.stderr
    assert b"block forwards: 332" in plan.stdout
    assert b"is not a bundle" in refused.stderr


def closing(*streams: str) -> tuple[str, ...]:
    """What starts a command with some streams closed, as `>&-` does."""
    return ("sh", "-c", " ".join(('exec "$@"', *streams)), "sh")


@pytest.mark.slow
def test_closed_streams_change_no_exit_code_and_no_file(dit_bundle: Path, tmp_path: Path) -> None:
    latents, there = tmp_path / "closed.npy", tmp_path / "there.npy"
    command = ("generate", dit_bundle, "--labels", 1, "--threads", 1, "--latents-out")
    everything, nowhere, silent, listed, unread = at_once(
        lambda: ran((*command, latents), {}, before=closing("<&-", ">&-", "2>&-")),
        lambda: ran((*command, there), {}, before=closing("<&-")),
        lambda: ran(REFUSED, {}, before=closing("<&-", ">&-", "2>&-")),
        lambda: ran(PLAN, {}, before=closing(">&-")),
        lambda: ran(PLAN, {}, before=closing("<&-", "2>&-")),
    )
    assert [each.code for each in (everything, nowhere, silent, listed, unread)] == [0, 0, FAILED, 0, 0]
    assert [each.err for each in (everything, nowhere, silent, listed, unread)] == [""] * 5
    assert "block forwards: 332" in unread.out
    assert latents.read_bytes() == there.read_bytes()


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_command_well_and_a_full_disk_does_not(dit_bundle: Path) -> None:
    def unread(*tokens: object) -> Ran:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            return ran(tokens, {}, stdout=writer)
        finally:
            os.close(writer)

    def full(*tokens: object) -> Ran:
        with Path("/dev/full").open("wb") as nowhere:
            return ran(tokens, {}, stdout=nowhere)

    *left, wrong, disk = at_once(
        lambda: unread(*PLAN),
        lambda: unread(*PLAN, "--json"),
        lambda: unread("plan", "--help"),
        lambda: unread(*REFUSED),
        lambda: full(*PLAN),
    )
    assert [(each.code, each.err) for each in left] == [(0, "")] * 3
    wrong.refused("--blocks")
    disk.refused("No space left on device")


def on_terminal(tokens: tuple[object, ...], environment: dict[str, str]) -> tuple[int, bytes]:
    """Exit code of a command whose streams are a terminal, and what the terminal got."""
    terminal, device = pty.openpty()
    tty.setraw(device)
    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(lambda: b"".join(read_all(terminal)))
        try:
            done = start(tokens, environment, stdin=device, stdout=device, stderr=device)
        finally:
            os.close(device)
        text = got.result(TIMEOUT_S)
    os.close(terminal)
    return done.returncode, text


def read_all(number: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(number, 1 << 16)
        except OSError as error:
            if error.errno == errno.EIO:  # how Linux tells that nobody has the terminal open
                return
            raise
        if not part:
            return
        yield part


@pytest.mark.slow
def test_a_terminal_gets_no_more_than_it_says_it_shows() -> None:
    dumb, plain, narrow, wrong, coloured = at_once(
        lambda: on_terminal(PLAN, {"TERM": "dumb"}),
        lambda: on_terminal(PLAN, {"TERM": "xterm", "NO_COLOR": "1"}),
        lambda: on_terminal(PLAN, {"TERM": "nonsense", "COLUMNS": "1", "LINES": "-3"}),
        lambda: on_terminal(REFUSED, {"TERM": "dumb"}),
        lambda: on_terminal(REFUSED, {"TERM": "xterm"}),
    )
    assert [code for code, _ in (dumb, plain, narrow, wrong, coloured)] == [0, 0, 0, FAILED, FAILED]
    assert b"block forwards: 332" in dumb[1]
    assert ESCAPE.encode() not in dumb[1] + wrong[1]
    assert COLOUR.search(plain[1]) is None
    assert COLOUR.search(coloured[1]) is not None
    assert not any(b"Traceback" in text for _, text in (dumb, plain, narrow, wrong, coloured))


# --- names of a stranger's bundle


@pytest.fixture
def copy(dit_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest may be changed."""
    return Path(shutil.copytree(dit_bundle, tmp_path / "copy.ilf"))


def strings_of(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every text, keys too: those end in None."""
    if isinstance(data, str):
        yield path
    elif isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            if isinstance(data, dict):
                yield (*path, key, None)
            yield from strings_of(value, (*path, key))


def one_of_each(data: Any) -> list[tuple[Any, ...]]:
    """A place for every kind of text: of a list, and of a table of files or graphs, one is enough."""
    kinds = {(path[0], len(path), path[-1] if len(path) > 2 else path): path for path in strings_of(data)}
    return list(kinds.values())


def deceive(data: Any, path: tuple[Any, ...]) -> None:
    """Put the hostile text in one place."""
    *above, last = path
    if last is None:
        last = above.pop()
        for key in above:
            data = data[key]
        data[last + HOSTILE] = data.pop(last)
        return
    for key in above:
        data = data[key]
    data[last] += HOSTILE


def check_harmless(shown: Ran) -> None:
    """No control character but the end of a line, no change of direction; one line if it is refused."""
    text = shown.out + shown.err
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    assert "\u202e" not in text
    if shown.code:
        assert (shown.code, len(shown.err.splitlines())) == (FAILED, 1)


def test_inspect_shows_hostile_names_as_text(run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")

    def change(data: dict[str, Any]) -> None:
        data["tools"][HOSTILE] = data["tools"]["torch"] = HOSTILE
        data["scheduler"]["_class_name"] = HOSTILE

    change_manifest(copy, change)
    shown = run("inspect", copy)
    assert (shown.code, shown.err) == (0, "")
    check_harmless(shown)
    assert shown.out.count("\\x1b[2J[bold red]x[/][link=http://a]") == 4
    verified = run("verify", copy)
    check_harmless(verified)
    assert json.loads(run("inspect", copy, "--json").out)["tools"][HOSTILE] == HOSTILE


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_hostile_text_anywhere_in_a_manifest_is_refused_or_harmless(run: Run, copy: Path, command: str) -> None:
    place = copy / MANIFEST_FILE
    original = place.read_text()
    places = one_of_each(json.loads(original))
    assert len(places) > 40
    for path in places:
        place.write_text(original)
        change_manifest(copy, lambda data, path=path: deceive(data, path))  # type: ignore[misc]
        check_harmless(run(command, copy))
