"""The borders of a bundle's graphs, derived from the dimensions of its parts."""

from .ports import BRANCHES, COEFFICIENTS, PICTURES, ROWS, Graph, Port, Role, Shape
from .spec import DecoderSpec, ModelSpec, Precision, TextSpec

FLOAT = "float32"


def graphs_of(spec: ModelSpec, precision: Precision) -> tuple[Graph, ...]:
    """The five graphs' borders, in the order of GRAPHS.

    `picture` names the picture of each row, `conditional` and `unconditional` the rows of each picture: a guided
    bundle can so run a picture once when guidance is off.
    """
    rows, loop, width = spec.rows, spec.loop, spec.width
    latent: Shape = (PICTURES, *spec.latent_dims)
    dtype = FLOAT if spec.wide_residual else precision.dtype

    def streams(prefix: str, role: Role) -> tuple[Port, ...]:
        return tuple(
            Port(stream.port_name(prefix), (rows, *stream.tokens, stream.width), dtype, role) for stream in spec.streams
        )

    hidden, features = streams("hidden", Role.TOKENS), streams("features", Role.FEATURES)
    feedback, starts = streams("feedback", Role.FEEDBACK), streams("start", Role.START)[1:]
    after = spec.blocks - 1 - loop.end
    counts = {"pre": loop.begin, "loop_body": loop.size, "loop_feedback": 1, "post": after}
    rows_of_blocks = (spec.modulation_rows, width)
    tables = {
        graph: Port("modulation", (rows, 1, *rows_of_blocks), FLOAT, Role.MODULATION)
        if spec.shares_modulation
        else Port(f"modulation_{graph}", (rows, count, *rows_of_blocks), FLOAT, Role.MODULATION)
        for graph, count in counts.items()
        if count
    }
    head = Port("modulation_head", (rows, spec.head_rows, width), FLOAT, Role.HEAD_MODULATION)
    per_block = {
        graph: tuple(
            Port(f"{port.name}_{graph}", (port.shape[0], count, *port.shape[1:]), port.dtype, port.role)
            for port in spec.per_block
        )
        for graph, count in counts.items()
        if count
    }
    of_blocks = {
        graph: (tables[graph], *per_block[graph], *spec.context) if graph in tables else () for graph in counts
    }
    per_time = dict.fromkeys([*tables.values(), head])
    positions = (Port("positions", (*spec.grid, width), FLOAT, Role.POSITIONS),) if spec.varies else ()
    doubled = (Port("picture", (ROWS,), "int32", Role.INDEX),) if spec.guidance else ()
    branches = tuple(Port(name, (PICTURES,), "int32", Role.INDEX) for name in BRANCHES) if spec.guidance else ()
    return (
        Graph(
            "cond",
            (Port("times", ("T",), FLOAT, Role.TIME), *spec.row_conditions, *spec.constants),
            (
                *(Port(port.name, ("T", *port.shape), port.dtype, port.role) for port in per_time),
                *(port for ports in per_block.values() for port in ports),
                *spec.context,
                *starts,
            ),
        ),
        Graph(
            "pre",
            (Port("latent", latent, FLOAT, Role.LATENT), *positions, *doubled, *starts, *of_blocks["pre"]),
            hidden,
        ),
        Graph(
            "loop_body",
            (*hidden, *feedback, Port("scales", (loop.size,), FLOAT, Role.SCALES), *of_blocks["loop_body"]),
            features,
        ),
        Graph("loop_feedback", (*features, *of_blocks["loop_feedback"]), feedback),
        Graph(
            "post",
            (
                *features,
                *of_blocks["post"],
                head,
                *branches,
                Port("latent", latent, FLOAT, Role.LATENT),
                *(Port(name, latent, FLOAT, Role.PREDICTION) for name in ("history_1", "history_2")),
                Port("coefficients", (len(COEFFICIENTS),), FLOAT, Role.COEFFICIENTS),
            ),
            (Port("next_latent", latent, FLOAT, Role.LATENT), Port("prediction", latent, FLOAT, Role.PREDICTION)),
        ),
    )


def all_graphs(
    spec: ModelSpec, precision: Precision, text: TextSpec | None, decoder: DecoderSpec | None
) -> tuple[Graph, ...]:
    """The borders of all graphs of a bundle: the model's five, then those of the text encoder and of the decoder."""
    return (*graphs_of(spec, precision), *(part.graph for part in (text, decoder) if part is not None))
