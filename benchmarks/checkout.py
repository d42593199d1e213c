"""Gives a checkout its version where nothing can be installed: a folder for PYTHONPATH with a link to the package.

    export PYTHONPATH=$(python -m benchmarks.checkout)

The folder also holds the name and the version of the package, which `importlib.metadata` reads in this process and in
its children. The dependencies of the package must be installed already.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "importable"
PACKAGE = "ilf_trt"


def lay_out(folder: Path) -> Path:
    """Write the link and the metadata into `folder`; a second call renews them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    metadata = folder / f"{PACKAGE}-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    link = folder / PACKAGE
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT / PACKAGE)
    return folder


if __name__ == "__main__":
    print(lay_out(FOLDER))
