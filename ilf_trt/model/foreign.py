"""Models of others: none of their code runs, and no weight is made up, left out or misread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ilf_trt.contract.document import DocumentError, read_json
from ilf_trt.errors import CheckpointError, shown

CONFIGS = ("config.json", "tokenizer_config.json", "model_index.json", "preprocessor_config.json")
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
MOST_NAMES = 3


def refuse_foreign_code(folder: str | Path) -> None:
    """Raise CheckpointError for a folder whose configs ask for code of their own; it is never run."""
    for name in CONFIGS:
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            config = read_json(path, foreign=True)
        except DocumentError as error:
            raise CheckpointError(f"{error}; copy the folder again") from error
        for key in CODE_KEYS:
            if config.get(key):
                raise CheckpointError(
                    f"{path} asks to run code of its own ({key}), which ilf-trt never does; use a model that its "
                    "library knows by itself, and remove that entry if it does"
                )
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{path} holds quantised weights (quantization_config), which would be misread; use the weights in "
                "float32, float16 or bfloat16"
            )


def load_whole(load: Callable[..., tuple[Any, dict[str, Any]]], source: str) -> Any:
    """What `load(output_loading_info=True)` gives, once every weight was found and every one that was found is used.

    Raises CheckpointError with the first names.
    """
    model, info = load(output_loading_info=True)
    for kind, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds, which the model does not have,"),
        ("mismatched_keys", "holds in another shape"),
        ("error_msgs", "cannot be read:"),
    ):
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            few = shown(", ".join(names[:MOST_NAMES]), 150)
            raise CheckpointError(
                f"{source} {what} {few} ({len(names)} in all); its config.json and its weights are of different "
                "models: copy both from one place"
            )
    return model
