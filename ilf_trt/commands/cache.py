"""The commands `cache ls` and `cache prune`."""

import time
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ilf_trt.assembly.build_cache import DAY_S, BuildCache
from ilf_trt.assembly.cache_folder import cache_folder
from ilf_trt.contract.target import GIB
from ilf_trt.errors import InvalidRequest

from .flags import CacheFolder
from .numbers import OptionalReal

MIB = 1 << 20


def list_cache(*, cache_dir: CacheFolder = None) -> None:
    """List what the build cache holds, the last used first.

    Example: `ilf-trt cache ls`
    """
    cache = BuildCache(cache_folder(cache_dir))
    entries = cache.entries()
    table = Table("key", "graph", "model", "precision", "built with", "for", "MiB", "last used, days ago")
    for entry in entries:
        note = entry.note
        table.add_row(
            entry.key[:12],
            *(str(note.get(name, "?")) for name in ("graph", "model", "precision")),
            f"{note.get('target', '?')} {note.get('version', '')}",
            ", ".join(map(str, note.get("gpus", ()))),
            f"{entry.size_bytes / MIB:.1f}",
            f"{(time.time() - entry.used_s) / DAY_S:.1f}",
        )
    console = Console()
    if entries:
        console.print(table)
    total = sum(entry.size_bytes for entry in entries)
    console.print(
        f"{cache.folder}: {len(entries)} builds, {total / MIB:.1f} MiB", highlight=False, markup=False, soft_wrap=True
    )


def prune_cache(
    *,
    days: OptionalReal = None,
    max_gib: OptionalReal = None,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    cache_dir: CacheFolder = None,
) -> None:
    """Remove builds from the build cache.

    Example: `ilf-trt cache prune --days 30`

    Parameters
    ----------
    days
        Remove what was not used for so many days.
    max_gib
        Then remove the least recently used until the rest fits.
    all_
        Remove everything.
    """
    if (days is None and max_gib is None) != all_:
        raise InvalidRequest("say what to remove: --days 30, --max-gib 20, or --all alone")
    for flag, value in (("--days", days), ("--max-gib", max_gib)):
        if value is not None and value < 0:
            raise InvalidRequest(f"{flag} is {value}, it must not be negative")
    cache = BuildCache(cache_folder(cache_dir))
    removed = cache.prune(
        max_age_s=None if days is None else days * DAY_S, max_bytes=None if max_gib is None else int(max_gib * GIB)
    )
    freed = sum(entry.size_bytes for entry in removed)
    Console().print(
        f"{cache.folder}: removed {len(removed)} builds, {freed / MIB:.1f} MiB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
