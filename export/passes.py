"""Passes over an exported graph: each changes it in place and returns how many changes it made."""

from typing import Any


def strip_metadata(model: Any) -> int:
    """Drop the exporter's notes (stack traces, local paths, scopes), which make equal graphs differ in bytes."""
    changes = 0
    holders = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        holders += [node, *node.outputs]
    for holder in holders:
        if holder.metadata_props:
            holder.metadata_props.clear()
            changes += 1
        if getattr(holder, "doc_string", None):
            holder.doc_string = None
            changes += 1
    return changes
