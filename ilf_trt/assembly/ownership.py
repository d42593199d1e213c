"""Who can write a file or a folder: like ssh, a build uses nothing of its cache that others can write."""

import errno
import os
import stat
from pathlib import Path

ROOT = 0
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
OTHERS_WRITE, OTHERS = 0o022, 0o077


def check_own(path: Path, facts: os.stat_result | None = None, *, secret: bool = False) -> None:
    """Raise PermissionError when somebody else than this user and root can write `path`, or read it if `secret`.

    A link is judged by what it leads to. `facts` are those of the open file, if there is one. An access list of POSIX
    counts too: what it gives to others at most, stands in the permissions of the group.
    """
    facts = path.stat() if facts is None else facts
    user, mode = os.geteuid(), stat.S_IMODE(facts.st_mode)
    if facts.st_uid not in (user, ROOT):
        raise _refusal(path, f"belongs to user {facts.st_uid}, expected {user}; choose another folder")
    if mode & (OTHERS if secret else OTHERS_WRITE):
        what, command = ("read", "go-rwx") if secret else ("write", "go-w")
        raise _refusal(path, f"has mode {mode:04o}, others can {what} it; run chmod -R {command} on it")


def make_own(folder: Path) -> None:
    """Let nobody but this user into a folder and everything in it. Raises OSError."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE)


def own_folder(folder: Path) -> Path:
    """`folder`, made private if it is not there. Raises OSError, PermissionError when others can write it."""
    folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    check_own(folder)
    return folder


def _refusal(path: Path, reason: str) -> PermissionError:
    return PermissionError(errno.EPERM, reason, str(path))
