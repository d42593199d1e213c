"""The export stage of a build: checkpoint in, graphs and reference and manifest out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ilf_trt.assembly.build_cache import Store, note_of, taken_or_made
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.bundle import CONSTANTS_FILE, REFERENCE_FILE, WEIGHTS_SUFFIX, graph_file, write_manifest
from ilf_trt.contract.graphs import all_graphs
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import make_plan, read_scheduler
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import MissingDependency

TOOLS = ("torch", "diffusers", "onnx", "onnxscript", "numpy")
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """The bundle's manifest, and which graphs came out of the build cache."""

    manifest: Manifest
    reused: tuple[str, ...]


def export_bundle(checkpoint: str, folder: Path, options: BuildOptions, progress: Progress) -> Exported:
    """Write every file of a bundle into `folder`; `progress` is told each stage's name as it begins.

    Raises CheckpointError, UnsupportedBackbone, UnsupportedScheduler, InvalidRequest, PortMismatch.
    """
    try:
        import torch

        from ilf_trt.export.cache_key import fingerprint_of_graph
        from ilf_trt.export.calibration import calibrate, calibration_conditions, calibration_of_bundle
        from ilf_trt.export.graph import export_segment
        from ilf_trt.export.pipeline.parts import Surroundings, cells_of, text_tokens
        from ilf_trt.export.reference import write_golden
        from ilf_trt.export.segments import constants_of, segments_of, spec_of
        from ilf_trt.model.checkpoint import load_ilf, read_checkpoint
    except ImportError as error:
        raise MissingDependency(f"building needs {error.name}; pip install 'ilf-trt[build]'") from error

    progress("load checkpoint")
    facts = read_checkpoint(checkpoint)
    pipeline = _pipeline(facts.folder, options)
    own = None if pipeline is None else pipeline.transformer
    base = options.base or (None if own is None or Path(facts.base).is_dir() else str(own))
    if base is not None:
        facts = replace(facts, base=base)
    scheduler = _scheduler(options, facts, pipeline)
    model = load_ilf(checkpoint, base=base).float()
    around = Surroundings.of(model, options, pipeline)
    plan = make_plan(
        scheduler,
        options.steps,
        blocks=len(model.adapter.blocks),
        loop=model.loop,
        feedback=options.feedback,
        rule=options.rule,
        ratio=options.ratio,
    )
    spec = spec_of(
        model,
        guidance=options.guidance,
        text_tokens=text_tokens(options, pipeline),
        train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
        precision=options.precision,
        wide_residual=options.wide_residual,
        hoist_text=options.hoist_text,
        sizes=cells_of(model, options, pipeline),
    )

    if options.verify:
        progress("reference")
        write_golden(
            folder / REFERENCE_FILE,
            model,
            segments_of(model, spec, Precision.FP32),
            spec,
            plan,
            scheduler,
            pictures=options.batch.min,
            guidance_scale=options.guidance_scale,
            precision=options.precision,
            device=options.device,
            beside=around.golden(),
        )

    fp8 = None
    if options.precision is Precision.FP8:
        progress("calibrate")
        if options.calibration is not None and options.calibration.is_dir():
            fp8 = calibration_of_bundle(options.calibration, model, spec, options.fp8_exclude)
        else:
            fp8 = calibrate(
                model,
                plan,
                scheduler,
                spec,
                calibration_conditions(spec, options.calibration),
                guidance_scale=options.guidance_scale,
                exclude=options.fp8_exclude,
                calibrator=options.calibrator,
                device=options.device,
            )

    scales = tuple(model.feedback.scales.tolist())
    if spec.constants:
        constants = {name: value.float().numpy() for name, value in constants_of(model, spec).items()}
        dtype = options.precision.array_dtype
        np.savez(folder / CONSTANTS_FILE, allow_pickle=False, **{k: v.astype(dtype) for k, v in constants.items()})
    model = model.to(getattr(torch, options.precision.dtype))
    store, reused = None if options.cache is None else Store(options.cache), []
    for name, segment in segments_of(model, spec, options.precision).items():
        progress(f"export {name}")
        amax = None
        if fp8 is not None:
            amax = {linear: fp8.amax[linear] for linear in sorted(fp8.amax) if spec.graph_of_linear(linear) == name}
        path = folder / graph_file(name)
        places = {"graph": path, "weights": path.with_name(path.name + WEIGHTS_SUFFIX)}
        key = fingerprint_of_graph(segment, options.precision, options.batch, amax) if store else ""
        note = note_of(spec, name, options.precision, target="onnx")
        if taken_or_made(store, key, places, note, partial(export_segment, segment, options.batch, path, amax=amax)):
            reused.append(name)
    reused += around.export(folder, spec, store, progress)

    manifest = write_manifest(
        folder,
        Manifest(
            spec=spec,
            precision=options.precision,
            batch=options.batch,
            graphs=all_graphs(spec, options.precision, around.text, around.decoder),
            scales=scales,
            plan=plan,
            scheduler={name: value for name, value in scheduler.items() if _is_plain(value)},
            guidance_scale=options.guidance_scale,
            base_sha256=facts.base_sha256,
            tools={tool: version(tool) for tool in ("ilf-trt", *TOOLS)},
            fp8=fp8,
            text=around.text,
            decoder=around.decoder,
            picture=around.picture,
            engines=(),
            files={},
        ),
    )
    return Exported(manifest, tuple(reused))


def _pipeline(checkpoint: Path, options: BuildOptions) -> Any:
    """The pipeline's folder: as given, or the checkpoint's own where it is one."""
    from ilf_trt.export.pipeline.folder import MODEL_INDEX, PipelineFolder

    if options.pipeline is not None:
        return PipelineFolder.open(options.pipeline)
    return PipelineFolder.open(checkpoint) if (checkpoint / MODEL_INDEX).is_file() else None


def _scheduler(options: BuildOptions, facts: Any, pipeline: Any) -> dict[str, Any]:
    """As asked for, the checkpoint's own or its base's, or the pipeline's."""
    if options.scheduler:
        return read_scheduler(options.scheduler)
    config: dict[str, Any] = facts.scheduler_config()
    if pipeline is not None and pipeline.scheduler is not None and config == DEFAULT_SCHEDULER:
        return read_scheduler(str(pipeline.scheduler))
    return config


def _is_plain(value: object) -> bool:
    """JSON has no infinity; the only option of diffusers that bears it, lambda_min_clipped, bears it by default."""
    return not isinstance(value, float) or isfinite(value)
