"""The borders of a bundle's graphs, derived from the dimensions of its model."""

from ilf_trt.contract.ports import BRANCHES, COEFFICIENTS, PICTURES, ROWS, Graph, Port, Shape
from ilf_trt.contract.spec import DecoderSpec, ModelSpec, Precision, TextSpec


def graphs_of(spec: ModelSpec, precision: Precision) -> tuple[Graph, ...]:
    """The five graphs' borders, in the order of GRAPHS.

    `picture` names the picture of every row, `conditional` and `unconditional` the rows of every picture, so that a
    guided bundle runs without a second row where guidance is off.
    """
    rows, loop, width = spec.rows, spec.loop, spec.width
    tokens: Shape = (rows, *spec.grid, width)
    latent: Shape = (PICTURES, *spec.latent_dims)
    dtype = Precision.FP32.dtype if spec.wide_residual else precision.dtype
    hidden, features, feedback = (Port(name, tokens, dtype) for name in ("hidden", "features", "feedback"))

    after = spec.blocks - 1 - loop.end
    counts = {"pre": loop.begin, "loop_body": loop.size, "loop_feedback": 1, "post": after}
    tables = {
        graph: Port("modulation", (rows, 1, 6, width), "float32")
        if spec.shares_rows
        else Port(f"modulation_{graph}", (rows, count, 6, width), "float32")
        for graph, count in counts.items()
        if count
    }
    head = Port("modulation_head", (rows, 2, width), "float32")
    own = {
        graph: tuple(
            Port(f"{port.name}_{graph}", (port.shape[0], count, *port.shape[1:]), port.dtype) for port in spec.per_block
        )
        for graph, count in counts.items()
        if count
    }
    of_blocks = {graph: (tables[graph], *own[graph], *spec.context) if graph in tables else () for graph in counts}
    per_time = dict.fromkeys([*tables.values(), head])
    places = (Port("positions", (*spec.grid, width), "float32"),) if spec.varies else ()
    doubled = (Port("picture", (ROWS,), "int32"),) if spec.guidance else ()
    branches = tuple(Port(name, (PICTURES,), "int32") for name in BRANCHES) if spec.guidance else ()

    return (
        Graph(
            "cond",
            (Port("times", ("T",), "float32"), *spec.row_conditions, *spec.constants),
            (
                *(Port(port.name, ("T", *port.shape), port.dtype) for port in per_time),
                *(port for ports in own.values() for port in ports),
                *spec.context,
            ),
        ),
        Graph("pre", (Port("latent", latent, "float32"), *places, *doubled, *of_blocks["pre"]), (hidden,)),
        Graph(
            "loop_body",
            (hidden, feedback, Port("scales", (loop.size,), "float32"), *of_blocks["loop_body"]),
            (features,),
        ),
        Graph("loop_feedback", (features, *of_blocks["loop_feedback"]), (feedback,)),
        Graph(
            "post",
            (
                features,
                *of_blocks["post"],
                head,
                *branches,
                *(Port(name, latent, "float32") for name in ("latent", "history_1", "history_2")),
                Port("coefficients", (len(COEFFICIENTS),), "float32"),
            ),
            (Port("next_latent", latent, "float32"), Port("prediction", latent, "float32")),
        ),
    )


def all_graphs(
    spec: ModelSpec, precision: Precision, text: TextSpec | None, decoder: DecoderSpec | None
) -> tuple[Graph, ...]:
    """The borders of all graphs of a bundle: the model's five, then those of the text encoder and of the decoder."""
    return (*graphs_of(spec, precision), *(part.graph for part in (text, decoder) if part is not None))
