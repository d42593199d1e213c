"""The export of a bundle: a checkpoint becomes graphs, a reference and a manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch

from ilf_trt.assembly.build_cache import BuildCache, entry_note, take_or_make
from ilf_trt.assembly.options import BuildOptions, PipelinePart
from ilf_trt.assembly.stages import Stages
from ilf_trt.contract.arrays import write_npz
from ilf_trt.contract.bundle import CONSTANTS_FILE, REFERENCE_FILE, graph_file, weights_file, write_manifest
from ilf_trt.contract.graphs import all_graphs
from ilf_trt.contract.manifest import Calibration, Manifest
from ilf_trt.contract.plan import StepPlan, make_plan, read_scheduler
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.files import is_file, is_folder
from ilf_trt.model.checkpoint import Checkpoint, fingerprint, read_checkpoint
from ilf_trt.model.hub_folder import MODEL_INDEX
from ilf_trt.model.identity import HALVES
from ilf_trt.model.ilf_model import ILFModel

from .cache_key import graph_key
from .calibration import calibrate, calibration_conditions, calibration_of_bundle
from .graph import export_segment
from .pipeline.base_check import check_base, check_kind
from .pipeline.defaults import RequestDefaults
from .pipeline.folder import PipelineFolder
from .pipeline.parts import PipelineParts, cells_of, text_tokens
from .reference import write_reference
from .segments import constants_of, segments_of, spec_of

TOOLS = ("torch", "diffusers", "onnx", "onnxscript", "numpy")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exported:
    """The bundle's manifest, the graphs that came out of the build cache, and the parts of the pipeline."""

    manifest: Manifest
    reused: tuple[str, ...]
    parts: PipelineParts


@dataclass(frozen=True, slots=True)
class Source:
    """What a bundle is exported from: the model in float32, its dimensions, its plan, and its pipeline's parts."""

    model: ILFModel
    spec: ModelSpec
    plan: StepPlan
    scheduler: dict[str, Any]
    parts: PipelineParts
    defaults: RequestDefaults
    base_sha256: str
    base_rounded_sha256: dict[str, str]

    @classmethod
    def open(cls, checkpoint: str, options: BuildOptions) -> "Source":
        """Read a checkpoint, its base and its pipeline's folder, once each.

        Raises CheckpointError, UnsupportedBackbone, UnsupportedScheduler, InvalidRequest.
        """
        facts = read_checkpoint(checkpoint)
        folder = _pipeline_folder(facts.folder, options)
        if folder is not None:
            check_kind(folder, facts)
        facts = replace(facts, base=_base(options, facts, folder))
        scheduler = _scheduler(options, facts, folder)
        model = facts.load(base_differs=options.base_differs).float()
        if folder is not None:
            check_base(folder, model, facts.base, base_differs=options.base_differs)
        spec = spec_of(
            model,
            guidance=options.guidance,
            text_tokens=text_tokens(options, folder),
            train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
            precision=options.precision,
            wide_residual=options.wide_residual,
            hoist_text=options.hoist_text,
            sizes=cells_of(model, options, folder),
        )
        plan = make_plan(
            scheduler,
            options.steps,
            blocks=spec.blocks,
            loop=spec.loop,
            feedback=options.feedback,
            rule=options.rule,
            ratio=options.ratio,
        )
        parts = PipelineParts.of(model, options, folder)
        base = model.backbone
        return cls(
            model=model,
            spec=spec,
            plan=plan,
            scheduler=scheduler,
            parts=parts,
            defaults=RequestDefaults.of(checkpoint, options, folder, model.adapter, text=parts.text is not None),
            base_sha256=facts.base_sha256 if model.trained_on is None else fingerprint(base),
            base_rounded_sha256={str(dtype).removeprefix("torch."): fingerprint(base, dtype) for dtype in HALVES},
        )


def export_bundle(
    checkpoint: str, folder: Path, options: BuildOptions, cache: BuildCache | None, stages: Stages
) -> Exported:
    """Write every file of a bundle into `folder`.

    Raises CheckpointError, UnsupportedBackbone, UnsupportedScheduler, InvalidRequest, PortMismatch.
    """
    stages.enter("load checkpoint")
    source = Source.open(checkpoint, options)
    if options.verify:
        stages.enter("reference")
        _reference(source, folder, options)
    calibration = None
    if options.precision is Precision.FP8:
        stages.enter("calibrate")
        calibration = _calibration(source, options)
    scales = tuple(source.model.feedback.scales.tolist())
    reused = _graphs(source, folder, options, calibration, cache, stages)
    return Exported(_manifest(source, folder, options, calibration, scales), reused, source.parts)


def export_part(
    exported: Exported,
    folder: Path,
    part: PipelinePart,
    precision: Precision,
    cache: BuildCache | None,
    stages: Stages,
) -> Exported:
    """Write a part of the pipeline into the bundle in `folder` again, in another precision; the other graphs stay.

    Raises CheckpointError.
    """
    stages.enter(f"export {part.graph} in {precision}")
    parts, old = exported.parts.in_precision(part, precision), exported.manifest
    path = folder / graph_file(part.graph)
    for file in (path, weights_file(path)):
        file.unlink(missing_ok=True)
    cached = parts.export_part(part, folder, old.spec, cache)
    graphs = all_graphs(old.spec, old.precision, parts.text, parts.decoder)
    manifest = write_manifest(folder, replace(old, graphs=graphs, text=parts.text, decoder=parts.decoder))
    others = tuple(name for name in exported.reused if name != part.graph)
    return Exported(manifest, (*others, part.graph) if cached else others, parts)


def _reference(source: Source, folder: Path, options: BuildOptions) -> None:
    """What torch gives in float32, for `verify`."""
    write_reference(
        folder / REFERENCE_FILE,
        source.model,
        segments_of(source.model, source.spec, Precision.FP32),
        source.spec,
        source.plan,
        source.scheduler,
        pictures=options.batch.min,
        guidance_scale=source.defaults.guidance_scale,
        precision=options.precision,
        device=options.device,
        of_parts=source.parts.reference(),
    )


def _calibration(source: Source, options: BuildOptions) -> Calibration:
    """The largest inputs of the Linears and attentions that run in FP8: those of an FP8 bundle, or measured."""
    tokens = min(height * width for height, width in source.spec.sizes) // source.spec.patch**2
    attention = options.has_fp8_attention(tokens)
    if options.calibration is not None and is_folder(options.calibration):
        return calibration_of_bundle(
            options.calibration,
            source.model,
            source.spec,
            options.fp8_exclude,
            attention=attention,
        )
    return calibrate(
        source.model,
        source.plan,
        source.scheduler,
        source.spec,
        calibration_conditions(source.spec, options.calibration),
        guidance_scale=source.defaults.guidance_scale,
        exclude=options.fp8_exclude,
        attention=attention,
        calibrator=options.calibrator,
        device=options.device,
    )


def _graphs(
    source: Source,
    folder: Path,
    options: BuildOptions,
    calibration: Calibration | None,
    cache: BuildCache | None,
    stages: Stages,
) -> tuple[str, ...]:
    """The constants and every graph, in the bundle's precision; gives the graphs that the build cache had."""
    spec, precision = source.spec, options.precision
    if spec.constants:
        constants = {name: value.float().numpy() for name, value in constants_of(source.model, spec).items()}
        arrays = {name: value.astype(precision.array_dtype) for name, value in constants.items()}
        write_npz(folder / CONSTANTS_FILE, arrays)
    model = source.model.to(getattr(torch, precision.dtype))
    reused = []
    for name, segment in segments_of(model, spec, precision).items():
        stages.enter(f"export {name}")
        amax, attentions = None, None
        if calibration is not None:
            amax = _of_graph(calibration.amax, name, spec)
            attentions = _of_graph(calibration.attentions, name, spec)
        path = folder / graph_file(name)
        places = {"graph": path, "weights": weights_file(path)}
        pad = options.pads_heads and bool(attentions)
        key = graph_key(segment, precision, options.batch, amax, attentions, pad=pad) if cache else ""
        note = entry_note(spec, name, precision, target="onnx")
        export = partial(export_segment, segment, options.batch, path, amax=amax, attentions=attentions, pad=pad)
        if take_or_make(cache, key, places, note, export):
            reused.append(name)
    return (*reused, *source.parts.export(folder, spec, cache, stages))


def _of_graph(facts: Mapping[str, T], graph: str, spec: ModelSpec) -> dict[str, T]:
    """What `facts` say of the Linears or attentions of one graph."""
    return {name: facts[name] for name in sorted(facts) if spec.graph_of_linear(name) == graph}


def _manifest(
    source: Source, folder: Path, options: BuildOptions, calibration: Calibration | None, scales: tuple[float, ...]
) -> Manifest:
    parts, spec = source.parts, source.spec
    manifest = Manifest(
        spec=spec,
        precision=options.precision,
        batch=options.batch,
        graphs=all_graphs(spec, options.precision, parts.text, parts.decoder),
        scales=scales,
        plan=source.plan,
        scheduler={name: value for name, value in source.scheduler.items() if _is_plain(value)},
        guidance_scale=source.defaults.guidance_scale,
        clean_captions=source.defaults.clean_captions,
        base_sha256=source.base_sha256,
        base_rounded_sha256=source.base_rounded_sha256,
        base_differs=source.model.trained_on is not None,
        tools={tool: version(tool) for tool in ("ilf-trt", *TOOLS)},
        fp8=calibration,
        text=parts.text,
        decoder=parts.decoder,
        picture=parts.picture,
        engines=(),
        files={},
    )
    return write_manifest(folder, manifest)


def _pipeline_folder(checkpoint: Path, options: BuildOptions) -> PipelineFolder | None:
    """The folder of `--pipeline`, or the checkpoint's own if it is a pipeline's."""
    if options.pipeline is not None:
        return PipelineFolder.open(options.pipeline)
    return PipelineFolder.open(checkpoint) if is_file(checkpoint / MODEL_INDEX) else None


def _base(options: BuildOptions, facts: Checkpoint, folder: PipelineFolder | None) -> str:
    """The base of `--base`; else the pipeline's if the checkpoint's is missing or may differ; else the checkpoint's."""
    own = None if folder is None else folder.transformer
    if options.base is None and own is not None and (options.base_differs or not is_folder(facts.base)):
        return str(own)
    return options.base or facts.base


def _scheduler(options: BuildOptions, facts: Checkpoint, folder: PipelineFolder | None) -> dict[str, Any]:
    """The scheduler of `--scheduler`, the checkpoint's own or its base's, or the pipeline's."""
    if options.scheduler:
        return read_scheduler(options.scheduler)
    own = facts.stored_scheduler()
    if own is None and folder is not None and folder.scheduler is not None:
        return read_scheduler(str(folder.scheduler))
    return facts.scheduler_config() if own is None else own


def _is_plain(value: object) -> bool:
    """JSON has no infinity; the only option of diffusers that can be infinite, lambda_min_clipped, is so by default."""
    return not isinstance(value, float) or isfinite(value)
