"""Bundles of the checkpoints that come with the package: built once, kept in the build cache."""

import hashlib
from pathlib import Path

from ilf_trt import __version__
from ilf_trt.contract.bundle import sha256_of
from ilf_trt.contract.manifest import SCHEMA
from ilf_trt.contract.packaged import Packaged, find_packaged
from ilf_trt.errors import BundleError, one_line

from .build_cache import BuildCache
from .cache_folder import cache_folder
from .conductor import build
from .options import BuildOptions


def bundle_of(name: str, cache: Path | None) -> Path:
    """Where the bundle of `name` lies: a folder as it is, or one of the package's, built into `cache` at its first use.

    `cache` is the user's own by default. Raises MissingDependency when it must be built and PyTorch is not there,
    BundleError when `cache` cannot be used, InvalidRequest as `cache_folder` does.
    """
    known = find_packaged(name)
    if known is None:
        return Path(name)
    cache = cache_folder(cache)
    note = {"graph": "bundle", "model": known.name, "precision": "fp32", "target": "onnx", "version": __version__}
    store, key, bundle = BuildCache(cache), _key(known), f"{known.name}.ilf"
    try:
        folder = store.find(key)
        if folder is None:
            with store.making(key, note) as draft:
                build(known.name, draft / bundle, BuildOptions(guidance_scale=known.guidance_scale))
            folder = store.find(key)
    except OSError as error:
        raise _no_place(known, f"{error.filename or cache}: {one_line(error)}") from error
    if folder is None:
        raise _no_place(known, f"{cache} holds another one, and it cannot be removed")
    return folder / bundle


def _no_place(known: Packaged, reason: str) -> BundleError:
    return BundleError(
        f"the bundle {known.name!r} has no place: {reason}; pass another --cache-dir, or make a bundle with "
        f"ilf-trt build --checkpoint {known.name} -o {known.name}.ilf"
    )


def _key(known: Packaged) -> str:
    """The version, the bundle's schema and the checkpoint's content: another of any is another bundle."""
    files = sorted(path for path in known.folder.rglob("*") if path.is_file())
    words = [known.name, __version__, str(SCHEMA), *(f"{path.name} {sha256_of(path)}" for path in files)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
