"""The command `compile`: add engines to a bundle."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from ilf_trt.assembly.conductor import compile_bundle
from ilf_trt.errors import InvalidRequest

from .build_view import print_build
from .flags import EngineFlags
from .progress_bar import progress_bar


def compile(
    bundle: Path,
    /,
    *,
    engines: EngineFlags = EngineFlags(),  # noqa: B008
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    force: bool = False,
) -> None:
    """Add engines to a bundle that was built elsewhere; needs no PyTorch.

    Example: `ilf-trt compile model.ilf --target tensorrt`

    Parameters
    ----------
    bundle
        Folder of the bundle.
    output
        Folder of the bundle to write; by default the same one, which stays whole until the engines are there.
    force
        Replace another bundle at the output.
    """
    options = engines.options()
    if options is None:
        raise InvalidRequest("compile needs --target tensorrt, or --target tensorrt-rtx --gpu sm89,sm120")
    with progress_bar() as progress:
        result = compile_bundle(
            bundle,
            bundle if output is None else output,
            options,
            strip=engines.strip_graphs,
            cache=engines.cache_folder(),
            force=force or output is None,
            progress=progress,
        )
    print_build(result, Console())
