"""Judges of pictures: one for the digits' pixels, and one for CIFAR-10 by a trained classifier."""

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
REAL_PICTURES = 5_000
BATCH = 250


class Judge(Protocol):
    """Compares pictures with real ones; pictures are (N, C, H, W) in [-1, 1], in the order of `labels` (N,)."""

    labels: NDArray[np.int64]

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        """Fréchet distance, label accuracy, precision, recall, density and coverage."""

    def distances(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        """PSNR in dB and distance of features to the pictures that a long run makes of the same noise."""


class DigitsJudge:
    """Features are the 64 pixels; a support vector machine, trained on the real digits, classifies the pictures."""

    def __init__(self, rounds: int = 1) -> None:
        pixels, labels = digits()
        self.real = pixels.reshape(len(pixels), -1).astype(np.float64)
        self.labels = np.tile(labels, rounds)
        self.statistics = Gaussian.of(self.real)
        self.classifier = SVC(gamma=0.05).fit(self.real, labels)

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        pixels = np.clip(pictures.reshape(len(pictures), -1).astype(np.float64), -1, 1)
        return {
            "frechet": Gaussian.of(pixels).distance(self.statistics),
            "accuracy": float((self.classifier.predict(pixels) == self.labels).mean()),
            **manifold(self.real, pixels),
        }

    def distances(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        return {"psnr_db": psnr(pictures, reference), "feature_distance": float("nan")}


class CifarJudge:
    """Features are the 64 pooled numbers of a ResNet-56, trained on the training pictures; it also classifies."""

    def __init__(self, data: Path, classifier: Path, samples: int) -> None:
        self.network = load(classifier)
        pictures, _ = read(data, "train")
        subset = pictures[:: len(pictures) // REAL_PICTURES][:REAL_PICTURES]
        scaled = subset.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        self.real = self._predict(scaled).pooled
        self.statistics = Gaussian.of(self.real)
        self.labels = np.arange(samples) % 10

    def judge(self, pictures: NDArray[np.float32]) -> dict[str, float]:
        predicted = self._predict(pictures)
        return {
            "frechet": Gaussian.of(predicted.pooled).distance(self.statistics),
            "accuracy": float((predicted.classes == self.labels).mean()),
            **manifold(self.real, predicted.pooled),
        }

    def distances(self, pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
        return {
            "psnr_db": psnr(pictures, reference),
            "feature_distance": float(np.mean([stages(self.network, *pair) for pair in _pairs(pictures, reference)])),
        }

    @torch.inference_mode()
    def _predict(self, pictures: NDArray[np.float32]) -> "Prediction":
        pooled, classes = [], []
        for begin in range(0, len(pictures), BATCH):
            part = torch.from_numpy(pictures[begin : begin + BATCH]).clamp(-1, 1)
            features = self.network.pool(self.network.stages(part)[-1])
            pooled.append(features.double().numpy())
            classes.append(self.network.linear(features).argmax(1).numpy())
        return Prediction(np.concatenate(pooled), np.concatenate(classes))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Pooled features (N, 64) and the predicted classes (N,)."""

    pooled: Features
    classes: NDArray[np.int64]


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
        shift = self.mean - other.mean
        eigenvalues = np.linalg.eigvals(self.covariance @ other.covariance).real
        roots = np.sqrt(np.clip(eigenvalues, 0, None))  # features that never vary give zeros
        return float(shift @ shift + np.trace(self.covariance) + np.trace(other.covariance) - 2 * roots.sum())


def manifold(real: Features, generated: Features, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), balls to the k-th neighbour."""
    real_radius, generated_radius = (
        NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, -1] for points in (real, generated)
    )
    squares = (generated**2).sum(1)[:, None] + (real**2).sum(1)[None] - 2 * generated @ real.T
    distance = np.sqrt(np.clip(squares, 0, None))  # (generated, real)
    inside_real = distance <= real_radius[None]
    return {
        "precision": float(inside_real.any(1).mean()),
        "recall": float((distance <= generated_radius[:, None]).any(0).mean()),
        "density": float(inside_real.sum(1).mean() / k),
        "coverage": float(inside_real.any(0).mean()),
    }


def psnr(pictures: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The mean over pictures of the peak signal to noise ratio, in dB, for values in [-1, 1]."""
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
    """The numbers with four decimals, for a CSV."""
    return {name: round(value, 4) for name, value in numbers.items()}
