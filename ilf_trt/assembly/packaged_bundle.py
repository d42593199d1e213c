"""Bundles of the checkpoints that come with the package: built once, kept in the user's cache folder."""

import hashlib
from pathlib import Path

from ilf_trt import __version__
from ilf_trt.contract.bundle import sha256_of
from ilf_trt.contract.manifest import SCHEMA
from ilf_trt.contract.packaged import Packaged, find_packaged

from .conductor import build
from .options import BuildOptions


def bundle_of(name: str, cache: Path) -> Path:
    """Where the bundle of `name` lies: a folder as it is, or one of the package's, built into `cache` at its first use.

    Raises MissingDependency when it must be built and PyTorch is not there.
    """
    known = find_packaged(name)
    if known is None:
        return Path(name)
    folder = cache / "bundles" / f"{known.name}-{_key(known)}.ilf"
    if not folder.is_dir():
        build(known.name, folder, BuildOptions(guidance_scale=known.guidance_scale), force=True)
    return folder


def _key(known: Packaged) -> str:
    """The version, the bundle's schema and the checkpoint's content: another of any is another bundle."""
    files = sorted(path for path in known.folder.rglob("*") if path.is_file())
    words = [__version__, str(SCHEMA), *(f"{path.name} {sha256_of(path)}" for path in files)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
