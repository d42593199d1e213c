"""The probe: one feedback step, graph by graph, and one trajectory, whose results torch writes down at build time."""

from dataclasses import dataclass, field

TRAJECTORY = "trajectory"
TRAJECTORY_NOISE = "trajectory_noise"
ASKED = "asked_"
"""What stands before the conditions of the trajectory, a row for each picture; the graphs' are by rows of the batch."""
AT_T, AT_T_POST = 0, 1


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a graph: which time its per-time rows are for, and where a port reads another tensor than its name.

    `inputs` and `outputs` map a port to the name of a tensor of the reference; all others bear the port's own name.
    """

    graph: str
    time: int = AT_T
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


TEXT_IDS, TEXT_MASK, TEXT_EMBEDDED = "text_ids", "text_ids_mask", "text_embedded"
DECODE_LATENTS, DECODE_SHADES = "decode_latents", "decode_shades"
"""What transformers and diffusers themselves gave for graphs `text` and `decode`, where these are in the bundle."""

CASES = (
    Case("cond"),
    Case("pre"),
    Case("loop_body", inputs={"feedback": "no_feedback", "scales": "no_scales"}),
    Case("loop_feedback"),
    Case("loop_body", AT_T_POST, outputs={"features": "features_post"}),
    Case("post", AT_T_POST, inputs={"features": "features_post"}),
)
