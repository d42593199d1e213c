"""The reference cases: graph runs and one trajectory whose results torch writes down when a bundle is built."""

from dataclasses import dataclass, field

from .spec import ModelSpec

TRAJECTORY = "trajectory"
TRAJECTORY_NOISE = "trajectory_noise"
REQUESTED = "asked_"
"""Prefix of the trajectory's conditions, a row for each picture; those of the graphs have a row of the batch."""
AT_T, AT_T_POST = 0, 1
TEXT_IDS, TEXT_MASK, TEXT_EMBEDDED = "text_ids", "text_ids_mask", "text_embedded"
DECODE_LATENTS, DECODE_SHADES = "decode_latents", "decode_shades"
"""What transformers and diffusers themselves give for graphs `text` and `decode`, if the bundle has them."""
NO_SCALES = "no_scales"


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a graph: which time its per-time rows are for, and the tensors that its ports read and write.

    `inputs` and `outputs` map a port to a tensor of the reference; every other tensor has the port's own name.
    """

    graph: str
    time: int = AT_T
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def no_feedback(port: str) -> str:
    """The name of the zeros that stand for the tensor of a feedback port."""
    return f"no_{port}"


def cases_of(spec: ModelSpec) -> tuple[Case, ...]:
    """One step with feedback, graph by graph."""
    feedback, features = ([stream.port_name(prefix) for stream in spec.streams] for prefix in ("feedback", "features"))
    post = {name: f"{name}_post" for name in features}
    return (
        Case("cond"),
        Case("pre"),
        Case("loop_body", inputs={**{name: no_feedback(name) for name in feedback}, "scales": NO_SCALES}),
        Case("loop_feedback"),
        Case("loop_body", AT_T_POST, outputs=post),
        Case("post", AT_T_POST, inputs=post),
    )
