"""The parts of a pipeline in a bundle: text encoder, tokenizer, decoder, and the facts about its pictures."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ilf_trt.assembly.build_cache import BuildCache, entry_note, take_or_make
from ilf_trt.assembly.options import BuildOptions, PipelinePart
from ilf_trt.assembly.stages import Stages
from ilf_trt.contract.bundle import TOKENIZER_FILE, graph_file, sha256_of, weights_file
from ilf_trt.contract.manifest import PictureFacts
from ilf_trt.contract.ports import Role
from ilf_trt.contract.spec import DecoderSpec, ModelSpec, Precision, TextSpec
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.cache_key import source_digest
from ilf_trt.model.ilf_model import ILFModel

from .decoder import decoder_spec_of, export_decoder
from .folder import PipelineFolder
from .reference import decoder_reference, text_reference
from .text_encoder import export_text, text_spec_of, write_tokenizer

DEFAULT_TEXT_TOKENS = 300
LATENT_CELL, LATENT_CHANNELS = 8, 4


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """The pipeline's own parts of a bundle; each may be missing."""

    folder: PipelineFolder | None
    text: TextSpec | None
    decoder: DecoderSpec | None
    picture: PictureFacts

    @classmethod
    def of(cls, model: ILFModel, options: BuildOptions, folder: PipelineFolder | None) -> "PipelineParts":
        """What the options leave of a pipeline's folder; raises InvalidRequest, CheckpointError."""
        channels, *_ = model.adapter.latent
        if folder is None:
            if options.without:
                raise InvalidRequest(f"--without {options.without[0]} is for a bundle that is built with --pipeline")
            return cls(None, None, None, PictureFacts(_cell(model, folder), {}, {}))
        picture = PictureFacts(folder.cell, folder.class_names, folder.bins)
        text = decoder = None
        if folder.has_text and PipelinePart.TEXT not in options.without:
            text = text_spec_of(
                folder, tokens=text_tokens(options, folder), precision=options.precision_of(PipelinePart.TEXT)
            )
            port = model.adapter.conditioning(text.tokens).port(Role.TEXT)
            channels_of_text = None if port is None else port.shape[-1]
            if text.channels != channels_of_text:
                raise _of_another(
                    folder, f"text encoder gives {text.channels} channels, the transformer takes {channels_of_text}"
                )
        if folder.has_decoder and PipelinePart.DECODER not in options.without:
            decoder = decoder_spec_of(
                folder,
                sizes=cells_of(model, options, folder),
                precision=options.precision_of(PipelinePart.DECODER),
                tile=options.decoder_tile,
            )
            if decoder.channels != channels:
                raise _of_another(
                    folder, f"decoder takes {decoder.channels} channels, the transformer gives {channels}"
                )
        return cls(folder, text, decoder, picture)

    def reference(self) -> dict[str, NDArray[Any]]:
        """What transformers and diffusers themselves give for the parts, by the names that `verify` asks for.

        A text encoder that is too large for the memory at hand is left out.
        """
        arrays: dict[str, NDArray[Any]] = {}
        if self.folder is not None and self.text is not None:
            arrays |= text_reference(self.folder, self.text)
        if self.folder is not None and self.decoder is not None:
            arrays |= decoder_reference(self.folder, self.decoder)
        return arrays

    def export(self, bundle: Path, spec: ModelSpec, cache: BuildCache | None, stages: Stages) -> tuple[str, ...]:
        """Write graphs and tokenizer into a bundle; gives the names of graphs that came out of the build cache."""
        if self.folder is None:
            return ()
        reused = []
        if self.text is not None:
            write_tokenizer(self.folder, bundle / TOKENIZER_FILE)
        for part in PipelinePart:
            if self._spec_of(part) is None:
                continue
            stages.enter(f"export {part.graph}")
            if self.export_part(part, bundle, spec, cache):
                reused.append(part.graph)
        return tuple(reused)

    def export_part(self, part: PipelinePart, bundle: Path, spec: ModelSpec, cache: BuildCache | None) -> bool:
        """Write the graph of a part that the pipeline has; tells whether it came out of the build cache."""
        own = self._spec_of(part)
        if self.folder is None or own is None:
            raise InvalidRequest(f"the bundle has no {part} part; build it with --pipeline")
        path = bundle / graph_file(part.graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        places = {"graph": path, "weights": weights_file(path)}
        subfolder = self.folder.path / ("text_encoder" if part is PipelinePart.TEXT else "vae")
        key = _key(subfolder, asdict(own)) if cache else ""
        note = entry_note(spec, part.graph, own.precision, target="onnx")
        if isinstance(own, TextSpec):
            make: Callable[[], None] = partial(export_text, self.folder, own, path)
        else:
            make = partial(export_decoder, self.folder, own, path)
        return take_or_make(cache, key, places, note, make)

    def in_precision(self, part: PipelinePart, precision: Precision) -> "PipelineParts":
        """The same parts, one of them in another precision."""
        if part is PipelinePart.TEXT:
            return replace(self, text=self.text and replace(self.text, precision=precision))
        return replace(self, decoder=self.decoder and replace(self.decoder, precision=precision))

    def _spec_of(self, part: PipelinePart) -> TextSpec | DecoderSpec | None:
        return self.text if part is PipelinePart.TEXT else self.decoder


def _of_another(folder: PipelineFolder, what: str) -> InvalidRequest:
    return InvalidRequest(f"{folder.path}: its {what}; give the pipeline that the checkpoint was trained on")


def text_tokens(options: BuildOptions, folder: PipelineFolder | None) -> int:
    """The length of a text: `--text-tokens`, the pipeline's own, or 300."""
    own = None if folder is None else folder.text_tokens
    return options.text_tokens or own or DEFAULT_TEXT_TOKENS


def cells_of(model: ILFModel, options: BuildOptions, folder: PipelineFolder | None) -> tuple[tuple[int, int], ...]:
    """The sizes of `options` in cells of a latent; the model's own without any. Raises InvalidRequest."""
    _, height, width = model.adapter.latent
    if not options.sizes:
        return ((height, width),)
    cell = _cell(model, folder)
    step = cell * model.adapter.patch
    for height, width in options.sizes:
        if height % step or width % step:
            low, high = (side // step * step or step for side in (height, width))
            raise InvalidRequest(
                f"size {height}x{width} is not in steps of {step} pixels, a patch of the model; the nearest below is "
                f"{low}x{high}"
            )
    return tuple((height // cell, width // cell) for height, width in options.sizes)


def _cell(model: ILFModel, folder: PipelineFolder | None) -> int:
    """Pixels to a side of a latent's cell: the pipeline's, or what latents of so many channels have by custom."""
    if folder is not None:
        return folder.cell
    return LATENT_CELL if model.adapter.latent[0] == LATENT_CHANNELS else 1


def _key(subfolder: Path, spec: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(source_digest().encode())
    digest.update(repr(sorted(spec.items())).encode())
    for path in sorted(subfolder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
