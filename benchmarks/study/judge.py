"""Judges of pictures without any download: one for the digits' pixels, one for CIFAR-10 by a trained classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.study.cifar10 import read
from benchmarks.study.resnet import ResNet, load
from ilf_trt.train.data.digits import digits

Features = NDArray[np.float64]
NEIGHBOURS = 5
REAL_NEIGHBOURS_OF = 5_000
BATCH = 250


class Judge(Protocol):
    """Holds what the real pictures say; pictures are (N, C, H, W) in [-1, 1], in the order of `labels` (N,)."""

    labels: NDArray[np.int64]

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        """Fréchet distance, label accuracy, precision, recall, density and coverage."""

    def apart(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        """How far pictures are from those that the same noise gave in a long run: PSNR in dB, features' distance."""


class DigitsJudge:
    """Features are the 64 pixels; labels are told by a support vector machine trained on the real digits."""

    def __init__(self, rounds: int = 1) -> None:
        pixels, labels = digits()
        self.real = pixels.reshape(len(pixels), -1).astype(np.float64)
        self.labels = np.tile(labels, rounds)
        self.statistics = Gaussian.of(self.real)
        self.classifier = SVC(gamma=0.05).fit(self.real, labels)

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        made = np.clip(pictures.reshape(len(pictures), -1).astype(np.float64), -1, 1)
        return {
            "frechet": Gaussian.of(made).distance(self.statistics),
            "accuracy": float((self.classifier.predict(made) == self.labels).mean()),
            **manifold(self.real, made),
        }

    def apart(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        return {"psnr_db": psnr(pictures, reference), "feature_distance": float("nan")}


class CifarJudge:
    """Features are the 64 numbers that a ResNet-56 pools; it has seen the training pictures, and tells the labels."""

    def __init__(self, data: Path, classifier: Path, samples: int) -> None:
        self.network = load(classifier)
        pictures, _ = read(data, "train")
        every = pictures[:: len(pictures) // REAL_NEIGHBOURS_OF][:REAL_NEIGHBOURS_OF]
        scaled = every.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        self.real = self._seen(scaled).pooled
        self.statistics = Gaussian.of(self.real)
        self.labels = np.arange(samples) % 10

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        seen = self._seen(pictures)
        return {
            "frechet": Gaussian.of(seen.pooled).distance(self.statistics),
            "accuracy": float((seen.told == self.labels).mean()),
            **manifold(self.real, seen.pooled),
        }

    def apart(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        return {
            "psnr_db": psnr(pictures, reference),
            "feature_distance": float(np.mean([stages(self.network, *pair) for pair in _pairs(pictures, reference)])),
        }

    @torch.inference_mode()
    def _seen(self, pictures: NDArray[np.float32]) -> "Seen":
        pooled, told = [], []
        for begin in range(0, len(pictures), BATCH):
            part = torch.from_numpy(pictures[begin : begin + BATCH]).clamp(-1, 1)
            features = self.network.pooled(self.network.stages(part)[-1])
            pooled.append(features.double().numpy())
            told.append(self.network.linear(features).argmax(1).numpy())
        return Seen(np.concatenate(pooled), np.concatenate(told))


@dataclass(frozen=True, slots=True)
class Seen:
    """pooled features (N, 64) and the class that the network tells (N,)."""

    pooled: Features
    told: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean and covariance of features."""

    mean: Features
    covariance: Features

    @classmethod
    def of(cls, features: Features) -> "Gaussian":
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))

    def distance(self, other: "Gaussian") -> float:
        """Fréchet distance."""
        apart = self.mean - other.mean
        eigenvalues = np.linalg.eigvals(self.covariance @ other.covariance).real
        roots = np.sqrt(np.clip(eigenvalues, 0, None))  # features that never vary give zeros
        return float(apart @ apart + np.trace(self.covariance) + np.trace(other.covariance) - 2 * roots.sum())


def manifold(real: Features, made: Features, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), balls to the k-th neighbour."""
    near_real, near_made = NearestNeighbors(n_neighbors=k + 1).fit(real), NearestNeighbors(n_neighbors=k + 1).fit(made)
    real_radius, made_radius = near_real.kneighbors(real)[0][:, -1], near_made.kneighbors(made)[0][:, -1]
    apart = np.sqrt(
        np.clip((made**2).sum(1)[:, None] + (real**2).sum(1)[None] - 2 * made @ real.T, 0, None)
    )  # (made, real)
    inside_real = apart <= real_radius[None]
    return {
        "precision": float(inside_real.any(1).mean()),
        "recall": float((apart <= made_radius[:, None]).any(0).mean()),
        "density": float(inside_real.sum(1).mean() / k),
        "coverage": float(inside_real.any(0).mean()),
    }


def psnr(pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Mean over pictures of the peak signal to noise ratio, in dB, for values in [-1, 1]."""
    error = ((np.clip(pictures, -1, 1) - np.clip(reference, -1, 1)).astype(np.float64) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(4 / np.maximum(error, 1e-10))))


@torch.inference_mode()
def stages(network: ResNet, pictures: Tensor, reference: Tensor) -> float:
    """LPIPS's recipe (arXiv 1801.03924) with unit weights: squared distance of unit features, summed over stages."""
    total = torch.zeros(len(pictures))
    for a, b in zip(network.stages(pictures), network.stages(reference), strict=True):
        a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
        total += (a - b).square().sum(1).mean((1, 2))
    return float(total.mean())


def _pairs(a: NDArray[np.float32], b: NDArray[np.float32]) -> Sequence[tuple[Tensor, Tensor]]:
    parts = range(0, len(a), BATCH)
    return [tuple(torch.from_numpy(x[i : i + BATCH]).clamp(-1, 1) for x in (a, b)) for i in parts]  # type: ignore[misc]


def rounded(numbers: Mapping[str, float]) -> dict[str, Any]:
    """Four digits, for a CSV."""
    return {name: round(value, 4) for name, value in numbers.items()}
