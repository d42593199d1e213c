"""The seal of this user: a digest that nobody can make who does not have the user's key."""

import errno
import fcntl
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from ilf_trt.contract.document import canonical
from ilf_trt.files import open_regular, whole_file

from .ownership import PRIVATE_FILE, check_own, own_folder

KEY_FILE = "build-cache.key"
KEY_BYTES = 32


class Seal:
    """HMAC-SHA256 under a random key of this user, which lies in the user's state folder (`~/.local/state/ilf-trt`)."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_user(cls) -> "Seal":
        """The seal with the user's key, made at its first use.

        Raises OSError when there is no home folder, when it cannot be written, or when others can read the key.
        """
        try:
            place = user_state_path("ilf-trt") / KEY_FILE
        except RuntimeError as error:
            raise _no_home() from error
        if not place.is_absolute():
            raise _no_home()
        folder = own_folder(place.parent)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # of two builds that begin at once, one makes the key
            if not os.path.lexists(place):
                with whole_file(place, mode=PRIVATE_FILE) as draft:
                    draft.write_bytes(secrets.token_bytes(KEY_BYTES))
        finally:
            os.close(handle)
        return cls(_read_key(place))

    def of(self, content: Mapping[str, Any]) -> str:
        """The seal of plain data, in hex."""
        return hmac.digest(self._key, canonical(content), "sha256").hex()

    def fits(self, content: Mapping[str, Any], seal: str) -> bool:
        """Whether `seal` is the one of `content`."""
        return hmac.compare_digest(self.of(content).encode(), seal.encode(errors="replace"))


def _read_key(place: Path) -> bytes:
    with open_regular(place) as file:
        check_own(place, os.fstat(file.fileno()), secret=True)
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise OSError(errno.EINVAL, "is damaged; remove it, and the next build makes another", str(place))
    return key


def _no_home() -> OSError:
    return OSError(errno.ENOENT, "there is no home folder for the key of the cache; set HOME or XDG_STATE_HOME")
