"""Where the model of a part lies: in its own folder or hub id, or in a subfolder of a pipeline's."""

from collections.abc import Sequence
from pathlib import Path

from ilf_trt.model.hub_folder import CONFIG, MODEL_INDEX, local_folder


def part_folder(what: str, source: str, subfolder: str, files: Sequence[str]) -> Path:
    """The folder on this disk; of a hub id with the `files` (patterns) of the model. Raises CheckpointError."""
    wanted = (MODEL_INDEX, CONFIG, *files, *(f"{subfolder}/{file}" for file in (CONFIG, *files)))
    folder = local_folder(what, source, wanted, "give its folder, or an id such as owner/name")
    return folder / subfolder if (folder / subfolder).is_dir() else folder
