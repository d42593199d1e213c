"""What a request takes that names neither a guidance scale nor whether prompts are cleaned."""

from dataclasses import dataclass

from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.backbone import Backbone, PipelineKind
from ilf_trt.model.backbones import pipeline_kinds

from .folder import PipelineFolder

PIXEL_CHANNELS = (1, 3)
OF_PIXELS = PipelineKind("no pipeline of diffusers", guidance_scale=1.5)


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Those of the options, of a packaged checkpoint, or of the diffusers pipeline that the model is served in."""

    guidance_scale: float
    clean_captions: bool

    @classmethod
    def of(
        cls, checkpoint: str, options: BuildOptions, folder: PipelineFolder | None, adapter: Backbone, *, text: bool
    ) -> "RequestDefaults":
        """`text` says whether the bundle has a text encoder; raises InvalidRequest for --clean-captions without one."""
        if options.clean_captions and not text:
            raise InvalidRequest(
                "--clean-captions is for a bundle with a text encoder; leave it out, or pass --pipeline"
            )
        kind, packaged = _kind(folder, adapter), find_packaged(checkpoint)
        scale, clean = kind.guidance_scale, kind.clean_captions
        if packaged is not None:
            scale, clean = packaged.guidance_scale, False
        scale = scale if options.guidance_scale is None else options.guidance_scale
        clean = clean if options.clean_captions is None else options.clean_captions
        return cls(effective_scale(scale) if options.guidance else OFF, text and clean)


def _kind(folder: PipelineFolder | None, adapter: Backbone) -> PipelineKind:
    """The class of the folder; without one the first of the model's, or none for pixels."""
    if folder is not None:
        return pipeline_kinds()[folder.kind]
    return OF_PIXELS if adapter.latent[0] in PIXEL_CHANNELS or not adapter.pipelines else adapter.pipelines[0]
