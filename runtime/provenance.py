"""What made a picture: the record that a PNG carries, so that the picture can be made again."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import numbers_of
from ilf_trt.contract.document import DocumentError, Size, as_type, canonical, parse_json
from ilf_trt.contract.plan import LARGEST, StepPlan
from ilf_trt.contract.stamp import Sha256
from ilf_trt.errors import IlfError, InvalidRequest, one_line, shown, told

from .arguments import MOST_PICTURES
from .request import Request
from .start_noise import NoiseSource, is_on_gpu
from .text.prompts import LONGEST_PROMPT

SCHEMA = 1
MOST_BYTES = 1 << 20
MOST_CONDITIONS = 32
NAME_CHARS = 200
LABELS = "class_labels"

Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS)]
Pictures = Annotated[int, msgspec.Meta(ge=1, le=MOST_PICTURES)]
Text = Annotated[str, msgspec.Meta(max_length=LONGEST_PROMPT)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a picture was made.

    `bundle` is the name of the bundle's folder without its path, or that of a packaged bundle; empty if it does not fit
    a record. `bundle_sha256` is the digest of its manifest. `library` is the engine library with its version, `ilf_trt`
    the version of this package.
    """

    bundle: Name
    bundle_sha256: Sha256
    device: Name
    library: Name
    ilf_trt: Name


@dataclass(frozen=True, slots=True)
class Provenance:
    """The whole of a request, and where it was served.

    `size` is (height, width) in pixels; `binning` says that another size was made and then scaled and cropped to it.
    `seed` and `labels` are as on the command line: `7`, or `1,2,3`, one for each picture. A request with its own start
    noise has no seed, but a digest of the noise; conditions too are recorded as a digest, by port, but for the labels.
    `columns` are the pictures in a row of the sheet.
    """

    origin: Origin
    plan: StepPlan
    pictures: Pictures
    columns: Pictures
    size: tuple[Size, Size]
    binning: bool
    guidance_scale: float
    seed: str | None
    noise: NoiseSource
    latents_sha256: Sha256 | None
    prompts: tuple[Text, ...]
    negative_prompts: tuple[Text, ...]
    clean_captions: bool
    labels: str | None
    conditions_sha256: dict[Name, Sha256]

    @classmethod
    def of(cls, request: Request, origin: Origin, pictures: int, columns: int) -> "Provenance":
        """The record of a served request; raises InvalidRequest for start noise that lies on a GPU.

        It takes the digests of the arrays as they are now.
        """
        if is_on_gpu(request.latents):
            raise InvalidRequest("start noise on a GPU leaves no digest to record; pass a seed, or a numpy array")
        prompts, drawn = request.prompts, request.latents is None
        seeds = request.seed if isinstance(request.seed, Sequence) else [request.seed]
        conditions = dict(request.conditions)
        labels = conditions.pop(LABELS) if _are_labels(conditions.get(LABELS)) else None
        against = () if prompts is None else prompts.negative
        return cls(
            origin=origin,
            plan=request.plan,
            pictures=pictures,
            columns=min(columns, pictures),
            size=request.size.requested,
            binning=request.size.requested != request.size.native,
            guidance_scale=float(request.guidance_scale),
            seed=_listed(seeds) if drawn else None,
            noise=NoiseSource(request.noise) if drawn else NoiseSource.TORCH,
            latents_sha256=None if drawn else digest_of(request.latents),
            prompts=() if prompts is None else prompts.positive,
            negative_prompts=against[:1] if len(set(against)) == 1 else against,
            clean_captions=prompts is not None and prompts.clean,
            labels=None if labels is None else _listed(labels.tolist()),
            conditions_sha256={name: digest_of(array) for name, array in conditions.items()},
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data; `Provenance.from_json` reads it back. Raises InvalidRequest for what no record may hold."""
        self.check()
        return {"schema": SCHEMA, **asdict(self), "plan": self.plan.as_json(), "noise": self.noise.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Provenance":
        """Raises InvalidRequest for another schema, and for a field that is missing, unknown or wrong."""
        schema = data.get("schema")
        if type(schema) is not int or schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            hint = "upgrade ilf-trt" if newer else "make the picture again with ilf-trt generate"
            raise InvalidRequest(f"the record has schema {told(schema, 40)}, this version reads {SCHEMA}; {hint}")
        try:
            plan = data.get("plan")
            if not isinstance(plan, Mapping):
                raise DocumentError("has no plan")
            fields = {name: value for name, value in data.items() if name != "schema"}
            provenance = as_type({**fields, "plan": asdict(StepPlan.from_json(plan))}, cls)
            provenance.check()
        except (IlfError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"the record is no record of a picture: {one_line(error)}") from error
        return provenance

    def encoded(self) -> bytes:
        """The record as ASCII JSON; raises InvalidRequest if it is larger than MOST_BYTES."""
        content = canonical(self.as_json())
        if len(content) > MOST_BYTES:
            raise InvalidRequest(f"the record of this picture has {len(content)} bytes, at most {MOST_BYTES} are kept")
        return content

    @classmethod
    def decoded(cls, content: bytes) -> "Provenance":
        """Raises InvalidRequest for what `encoded` did not write."""
        try:
            data = parse_json(content.decode("ascii"))
        except UnicodeDecodeError as error:
            raise InvalidRequest("the record is no ASCII text; make the picture again") from error
        except DocumentError as error:
            raise InvalidRequest(f"the record {error.reason}; make the picture again") from error
        return cls.from_json(data)

    def check(self) -> None:
        """Raise InvalidRequest for parts that contradict one another, or that `generate` would not take."""
        self.plan.check()
        if not abs(self.guidance_scale) <= LARGEST:
            raise InvalidRequest(f"guidance_scale is {self.guidance_scale:g}, it must be finite in float32")
        if self.origin.bundle and not is_folder_name(self.origin.bundle):
            raise InvalidRequest(f"the bundle's name {shown(self.origin.bundle, 60)!r} is no name of a folder")
        texts = (*asdict(self.origin).values(), *self.conditions_sha256)
        if not all(text.isprintable() for text in texts) or len(self.conditions_sha256) > MOST_CONDITIONS:
            raise InvalidRequest("a name does not fit on a line, or there are too many conditions")
        if (self.seed is None) == (self.latents_sha256 is None):
            raise InvalidRequest("it has both a seed and start noise, or neither")
        for what, count, allowed in (
            ("seeds", None if self.seed is None else len(numbers_of(self.seed, "seed")), (1, self.pictures)),
            ("labels", None if self.labels is None else len(numbers_of(self.labels, "labels")), (self.pictures,)),
            ("prompts", len(self.prompts), (0, self.pictures)),
            ("negative prompts", len(self.negative_prompts), (1, self.pictures) if self.prompts else (0,)),
        ):
            if count is not None and count not in allowed:
                raise InvalidRequest(f"{count} {what} for {self.pictures} pictures")

    def arguments(self, arrays: Mapping[str, NDArray[Any]], latents: NDArray[Any] | None) -> dict[str, Any]:
        """What `Pipeline.generate` takes to make the pictures again, with the request's own conditions and noise.

        Raises InvalidRequest for arrays and noise that are missing, or not those of the record.
        """
        given = {name: digest_of(array) for name, array in arrays.items()}
        labels = None if self.labels is None else numbers_of(self.labels, "labels")
        if labels is not None and LABELS in given and arrays[LABELS].tolist() == labels:
            del given[LABELS]
        if given != self.conditions_sha256:
            raise InvalidRequest(_other("conditions", "--conditions FILE.npz", given, self.conditions_sha256))
        noise = None if latents is None else digest_of(latents)
        if noise != self.latents_sha256:
            raise InvalidRequest(_other("start noise", "--latents-in FILE.npy", noise, self.latents_sha256))
        seeds: list[int] = [] if self.seed is None else numbers_of(self.seed, "seed")
        return {
            "prompt": self.prompts or None,
            "negative_prompt": self.negative_prompts or None,
            "class_labels": labels,
            "size": self.size,
            "plan": self.plan,
            "guidance_scale": self.guidance_scale,
            "seed": seeds[0] if len(seeds) == 1 else seeds,
            "noise": self.noise,
            "latents": latents,
            "clean_captions": self.clean_captions if self.prompts else None,
            "binning": self.binning,
            **{name: arrays[name] for name in given},
        }


Fact = Literal["bundle", "device", "library", "ilf-trt"]


def changes(then: Origin, now: Origin) -> list[tuple[Fact, str, str]]:
    """What is not as it was when a picture was made: the fact, its value then and now."""
    facts: list[tuple[Fact, str, str]] = [
        ("bundle", then.bundle_sha256[:12], now.bundle_sha256[:12]),
        ("device", then.device, now.device),
        ("library", then.library, now.library),
        ("ilf-trt", then.ilf_trt, now.ilf_trt),
    ]
    return [(fact, before, after) for fact, before, after in facts if before != after]


def is_folder_name(name: str) -> bool:
    """Whether a text names one folder in another, and nothing else: no path, no parent, nothing that does not print."""
    return 0 < len(name) <= NAME_CHARS and name.isprintable() and not {"/", "\\"} & set(name) and bool(name.strip(". "))


def digest_of(array: NDArray[Any]) -> str:
    """sha256 of an array's type, shape and numbers, in hex."""
    array = np.asarray(array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


def _are_labels(array: NDArray[Any] | None) -> bool:
    return array is not None and array.ndim == 1 and array.dtype.kind in "iu" and array.size > 0


def _listed(numbers: Iterable[Any]) -> str:
    return ",".join(map(str, numbers))


def _other(what: str, option: str, given: object, recorded: object) -> str:
    if not given:
        return f"the picture was made with {what} that its record has only a digest of; pass {option}"
    if not recorded:
        return f"the picture was made without {what}; leave out {option.split()[0]}"
    return f"{option.split()[0]} is not the file that the picture was made with: its content has another digest"
