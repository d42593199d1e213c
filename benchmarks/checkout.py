"""Makes a checkout importable where nothing can be installed: a folder of links, laid out as the package is.

    export PYTHONPATH=$(python -m benchmarks.checkout)

The repository's flat folders are `ilf_trt.export`, `ilf_trt.engines` and `ilf_trt.runtime`, which an installation maps.
This prints a folder that does the same, for this process and for those that it starts; edits show through the links.
What the package depends on must be there already.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "checkout"


def lay_out(folder: Path) -> Path:
    """Links and a name and version, as importlib.metadata finds them; a second call renews them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name, version = project["project"]["name"], project["project"]["version"]
    top = next(iter(project["tool"]["setuptools"]["package-dir"]))
    package = folder / top
    package.mkdir(parents=True, exist_ok=True)
    links = {path.name: path for path in (ROOT / top).iterdir() if path.name != "__pycache__"}
    for mapped, source in project["tool"]["setuptools"]["package-dir"].items():
        if mapped != top:
            links[mapped.removeprefix(f"{top}.")] = ROOT / source
    for stale in package.iterdir():
        if stale.is_symlink():
            stale.unlink()
    for link, target in links.items():
        (package / link).symlink_to(target)
    facts = folder / f"{top}-{version}.dist-info"
    facts.mkdir(exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


if __name__ == "__main__":
    print(lay_out(FOLDER))
