"""The seal of a user: its key is made once, is read by nobody else, and decides whether a seal fits."""

import os
import threading
from pathlib import Path

import pytest

from ilf_trt.assembly.ownership import check_own
from ilf_trt.assembly.seal import Seal

CONTENT = {"key": "a", "files": {}}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key will lie."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "ilf-trt" / "build-cache.key"


def test_the_key_is_made_once_and_is_private(key: Path) -> None:
    seal = Seal.of_user().of(CONTENT)
    assert Seal.of_user().fits(CONTENT, seal)
    assert (len(key.read_bytes()), key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (32, 0o600, 0o700)
    assert [path.name for path in key.parent.iterdir()] == [key.name]


def test_processes_that_begin_at_once_have_one_key(key: Path) -> None:
    start, seals = threading.Barrier(8), []

    def begin() -> None:
        start.wait()
        seals.append(Seal.of_user().of(CONTENT))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(seals), len(set(seals))) == (8, 1)


def test_a_seal_fits_one_content_under_one_key(key: Path) -> None:
    seal = Seal.of_user().of(CONTENT)
    assert not Seal.of_user().fits({**CONTENT, "key": "b"}, seal)
    assert not Seal(bytes(32)).fits(CONTENT, seal)
    for other in ("", seal[:-1], seal.upper(), "\ud800", "é" * 64):
        assert not Seal.of_user().fits(CONTENT, other)


@pytest.mark.parametrize(("mode", "what"), [(0o640, "read"), (0o604, "read"), (0o620, "read")])
def test_a_key_that_others_can_read_is_not_used(mode: int, what: str, key: Path) -> None:
    Seal.of_user()
    key.chmod(mode)
    with pytest.raises(PermissionError, match=f"others can {what} it"):
        Seal.of_user()


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_damaged_key_is_not_replaced_in_silence(content: bytes, key: Path) -> None:
    Seal.of_user()
    key.write_bytes(content)
    with pytest.raises(OSError, match="is damaged; remove it"):
        Seal.of_user()
    assert key.read_bytes() == content


@pytest.mark.parametrize(
    ("user", "mode", "reason"),
    [
        (0, 0o755, None),
        (1000, 0o700, None),
        (1001, 0o700, "belongs to user 1001, expected 1000"),
        (1000, 0o720, "has mode 0720, others can write it"),
        (0, 0o1777, "has mode 1777, others can write it"),
    ],
)
def test_a_file_is_ones_own_if_only_oneself_and_root_can_write_it(
    user: int, mode: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    facts = os.stat_result((mode, 0, 0, 1, user, 0, 0, 0, 0, 0))
    if reason is None:
        check_own(Path("a"), facts)
        return
    with pytest.raises(PermissionError, match=reason):
        check_own(Path("a"), facts)
