"""FID, KID and CLIP-FD: how far the whole set of images is from real pictures, whatever the prompts say."""

from __future__ import annotations

import hashlib
import json
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torchmetrics.image.kid import poly_kernel, poly_mmd

from paradiffusion.data.shards import IMAGE_EXTENSIONS
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate, mean
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult
from paradiffusion.evaluation.scores.image_features import Extractor, clip_weights, image_features, read_features
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.metrics import inception
from paradiffusion.metrics.clip import load_clip
from paradiffusion.randomness import seed_from

SUBSETS: Final = 100
SUBSET_SIZE: Final = 1000
_BLOCK: Final = 2048  # rows of a kernel matrix at once: [2048, 30000] float64 is 0.5 GB


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that Frechet's distance takes a set of features for: float64 mean [D], and a factor [K, D] whose
    ``factor.T @ factor`` is the covariance."""

    mean: np.ndarray
    factor: np.ndarray


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance (over N - 1) of ``features`` [N, D]; ValueError for fewer than 2."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} features have no covariance")
    rows = features.astype(np.float64)
    center = rows.mean(axis=0)
    rows = (rows - center) / np.sqrt(len(rows) - 1)
    # [min(N, D), D]: fewer images than features leave their covariance without inverse, and as a factor it needs none.
    factor: np.ndarray = np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows
    return Gaussian(center, factor)


def gaussian_from_moments(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    """A distribution of which mean [D] and covariance [D, D] are known. ValueError for other shapes, values that are not finite, and a
    matrix that is no covariance."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean {list(mean.shape)} and a covariance {list(covariance.shape)} do not fit together")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mean and covariance are not finite")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    scale = max(float(np.abs(values).max(initial=0)), np.finfo(float).tiny)
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-4 * scale or values.min(initial=0) < -1e-4 * scale:
        raise ValueError("the covariance is not symmetric with eigenvalues of at least 0")
    return Gaussian(mean, np.sqrt(values.clip(min=0))[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), of at least 0 (Heusel et al., arXiv 1706.08500, eq. 6).

    The trace of the root is the sum of the singular values of factor_a factor_b^T: that is exact for few images too, whose covariances
    are singular, where the root of a matrix [2048, 2048] is not.
    """
    root = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    apart = a.mean - b.mean
    return max(0.0, float(apart @ apart + (a.factor**2).sum() + (b.factor**2).sum() - 2 * root))


def frechet_influence(features: np.ndarray, reference: Gaussian) -> np.ndarray:
    """How the distance of ``features`` [N, D] to ``reference`` changes with more weight on each image: float64 [N], mean 0.

    The distance to first order is its value plus the mean of these over other images, so that their spread over prompts is
    its uncertainty (the infinitesimal jackknife, Efron 1981). To resample the images themselves would not do: a resample has
    fewer distinct images, and the distance grows as their number falls, so that all of its values lie above the one found.
    With m the mean, r that of the reference and T the optimal map between the two, image x gets
    2 (m - r)(x - m) + (x - m)^T (1 - T) (x - m), less the mean over all.
    """
    rows = features.astype(np.float64)
    center = rows.mean(axis=0)
    rows -= center
    cross = rows @ reference.factor.T  # [N, K]
    left, sizes, right = np.linalg.svd(cross, full_matrices=False)
    kept = sizes > sizes.max(initial=0) * max(cross.shape) * np.finfo(float).eps
    polar = left[:, kept] @ right[kept]  # [N, K]: cross (cross^T cross)^-1/2
    # (x - m)^T T (x - m), whose mean is tr (cov_a cov_b)^1/2, and |x - m|^2, whose mean is tr cov_a, both over N - 1.
    moved = (cross * polar).sum(axis=1) * len(rows) / np.sqrt(len(rows) - 1)
    size = (rows**2).sum(axis=1) * len(rows) / (len(rows) - 1)
    found = 2 * rows @ (center - reference.mean) + size - moved
    return found - found.mean()


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """KID: the unbiased squared maximum mean discrepancy of features [N, D] and [M, D], the mean over random subsets.

    The kernel is (x.y / D + 1)^3; each subset takes ``size`` of either set without repeating (Binkowski et al.,
    arXiv 1801.01401, section 4: 100 subsets of 1,000). A smaller set is taken whole; ValueError for fewer than 2 of either. It may
    come out below 0, as an unbiased estimate of something small must. Not multiplied by 1,000."""
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} features have no unbiased discrepancy")
    if size == len(a) == len(b):
        subsets = 1  # each would be the whole
    # torchmetrics' own class draws its subsets from PyTorch's global generator.
    rng = np.random.Generator(np.random.PCG64(seed_from("kernel distance", seed)))
    found = []
    for _ in range(subsets):
        one, other = (torch.from_numpy(x[rng.choice(len(x), size, replace=False)]).double() for x in (a, b))
        found.append(float(poly_mmd(one, other)))
    return float(np.mean(found))


def kernel_influence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As ``frechet_influence``, of the kernel distance: float64 [N] with mean 0, for features [N, D] and [M, D].

    Image x gets 2 (mean over the other images of k(x, .) - mean over the reference of k(x, .)), less the mean over all.
    """
    rows, others = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    own = (rows.square().mean(dim=1) + 1) ** 3  # the kernel of each with itself
    found = []
    for part, alone in zip(rows.split(_BLOCK), own.split(_BLOCK), strict=True):
        within = (poly_kernel(part, rows).sum(dim=1) - alone) / (len(rows) - 1)
        found.append(2 * (within - poly_kernel(part, others).mean(dim=1)))
    influence = torch.cat(found).numpy()
    return influence - influence.mean()


PICTURES: Final = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_EXPECTED: Final = "expected a folder of at least 2 pictures (PNG, JPEG, WebP), or a .npz with mu and sigma as pytorch-fid writes it"


@dataclass(frozen=True)
class Reference:
    """What to compare with: ``images`` of a folder, or ``moments``; ``settings`` differ when the pictures do."""

    settings: dict[str, Any]
    images: list[Drawn] = field(default_factory=list)
    moments: Gaussian | None = None


def open_reference(path: Path) -> Reference:
    """The reference at ``path``; pictures in folders below it count too, and are not read yet. UserError where there is nothing, no
    pictures, or no such statistics."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        # One that shows all pictures of a folder that the sampler drew is no picture of its own.
        files = [file for file in files if file.name != "grid.png" or not (file.parent / "manifest.jsonl").is_file()]
        if len(files) < 2:
            raise UserError(f"reference={path} holds {len(files)} pictures; {_EXPECTED}.")
        names = [file.relative_to(path).as_posix() for file in files]
        images = [Drawn(name, name, file) for name, file in zip(names, files, strict=True)]
        listing = "\n".join(f"{name} {file.stat().st_size}" for name, file in zip(names, files, strict=True))
        kept = {"kind": "folder", "path": str(path), "pictures": len(files), "listing": _hash(listing.encode())}
        return Reference(kept, images)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"reference={path} is no such folder or file; {_EXPECTED}.")
    moments = _moments(path)
    return Reference({"kind": "statistics", "path": str(path), "sha256": _hash(path.read_bytes())}, moments=moments)


def _moments(path: Path) -> Gaussian:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("mu", "sigma") if name not in file]
            if missing:
                raise ValueError(f"it has no {' and no '.join(missing)}")
            return gaussian_from_moments(file["mu"], file["sigma"])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, np.linalg.LinAlgError, MemoryError) as error:
        raise UserError(f"reference={path} cannot be used ({error}); {_EXPECTED}.") from None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_of(identity: dict[str, Any]) -> str:
    return _hash(json.dumps(identity, sort_keys=True).encode())


FEW: Final = 2000  # images under which a distance says more about their number than about the model


@dataclass
class _SetDistance(ABC):
    """A distance between the features of the images and those of a reference; a score (see ``records.Score``).

    An image that failed has no features, and a distance has no value for it: failures are listed, and counted in a warning.
    The interval is that of the distance for this many images of other prompts, against the same reference: the mean over
    resampled prompts of what each image adds to it (see ``frechet_influence``), which in simulation covers at 97 to
    99 %. It does not say how far the distance of infinitely many images lies. ``cache`` is a folder for the reference's features
    that several evaluations share; None to keep them in each."""

    reference: Path
    device: str = "cpu"
    cache: Path | None = None

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    biased: ClassVar[bool] = True  # upwards, and at least 0

    @cached_property
    def _opened(self) -> Reference:
        return open_reference(self.reference.expanduser())

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What the features depend on."""

    @abstractmethod
    def _extractor(self) -> Extractor:
        """The network that the features come from."""

    def _measured(self, features: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray]:
        """The distance of features [N, D] to those of the reference, and what each image adds to it [N], with mean 0."""
        against = self._opened.moments or gaussian(reference)
        return frechet_distance(gaussian(features), against), frechet_influence(features, against)

    def settings(self) -> dict[str, Any]:
        return {"features": self._identity(), "reference": self._opened.settings}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        extractor = self._extractor()
        image_features(images, extractor, self._made(work), run, title=f"{self.title}: images")
        pictures = self._opened.images[run.rank :: run.size]
        if pictures:
            image_features(pictures, extractor, self._real(work), run, title=f"{self.title}: reference")

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        found, features, errors = read_features(self._made(work), [image.name for image in images])
        good, real, lost = read_features(self._real(work), [image.name for image in self._opened.images])
        result = ScoreResult(self.name, self.title, self.formula, self.source, self.settings())
        result.measures = [Measure(self.name, self.title, "number", higher_is_better=False, worst=None)]
        prompt_of = {image.name: image.prompt for image in images}
        result.images = [ImageScore(name, prompt_of[name], {}, error=reason) for name, reason in errors.items()]
        result.skipped = self._why_not(len(found), len(images), len(good), features.shape[1])
        if result.skipped:
            return result
        value, influence = self._measured(features, real)
        around = mean(influence.tolist(), [prompt_of[name] for name in found])
        low = max(0.0, value + around.low) if self.biased else value + around.low
        result.overall[self.name] = Estimate(value, low, value + around.high, len(found), around.prompts)
        result.warnings = self._warnings(len(found), len(errors), around.prompts, len(lost), features.shape[1])
        return result

    def _why_not(self, found: int, images: int, pictures: int, width: int) -> str:
        moments = self._opened.moments
        if found < 2 or (moments is None and pictures < 2):
            return (
                f"{found} of {images} images and {pictures} pictures of the reference can be read, and a distance between "
                "sets needs at least 2 of each."
            )
        if moments is not None and len(moments.mean) != width:
            return (
                f"reference={self.reference} has statistics of {len(moments.mean)} features where {self.title} has {width}: "
                "give those of the same network, or the folder of the pictures."
            )
        return ""

    def _made(self, work: Path) -> Path:
        """Features of the images: beside ``work``, since FID and KID share them."""
        return work.parent / "features" / _hash_of(self._identity())

    def _real(self, work: Path) -> Path:
        return (self.cache or work.parent / "features") / f"reference-{_hash_of(self.settings())}"

    def _warnings(self, count: int, failed: int, prompts: int, lost: int, width: int) -> list[str]:
        pictures = len(self._opened.images) - lost
        found = []
        if count < FEW:
            what = "is mostly bias" if self.biased else "is uncertain"
            deficient = f", and that of fewer than {width + 1} has no full rank" if self.biased and count <= width else ""
            found.append(
                f"{self.title} of {count} images, fewer than {FEW:,}, {what}{deficient}: compare it only with values of as "
                "many images, of the same prompts and against the same reference."
            )
        if self._opened.images and pictures < FEW:
            found.append(f"The reference has {pictures} pictures, fewer than {FEW:,}.")
        if not self.biased and min(count, pictures) < SUBSET_SIZE:
            found.append(f"Its subsets are of {min(count, pictures)}, where {SUBSET_SIZE:,} are usual.")
        if failed:
            found.append(f"{failed} of {count + failed} images failed and are not in it: it has no value for a failure.")
        if lost:
            found.append(f"{lost} of {pictures + lost} pictures of the reference cannot be read and are left out.")
        if prompts < count:
            found.append(f"Its {count} images are of {prompts} prompts: images of one prompt are alike, which adds bias.")
        return found


@dataclass
class _OnInception(_SetDistance):
    """On the 2,048 features of the FID's own Inception network, from a local file (see ``metrics.inception``)."""

    weights: Path = field(kw_only=True)

    def __post_init__(self) -> None:
        self.weights = self.weights.expanduser()
        inception.load_inception(self.weights)  # wrong ones are refused before anything is drawn
        moments = self._opened.moments
        if moments is not None and len(moments.mean) != inception.WIDTH:
            raise UserError(
                f"reference={self.reference} has statistics of {len(moments.mean)} features where the FID's are of "
                f"{inception.WIDTH}; give those of pool3, or the folder of the pictures."
            )

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {"network": "FID Inception 2015-12-05, pool3", "sha256": self._sha256}

    def _extractor(self) -> Extractor:
        network = inception.load_inception(self.weights, self.device)
        return Extractor(inception.prepare, network.features)

    def _warnings(self, count: int, failed: int, prompts: int, lost: int, width: int) -> list[str]:
        found = super()._warnings(count, failed, prompts, lost, width)
        if not self._sha256.startswith(inception.PUBLISHED):
            found.append(
                f"{self.weights.name} has not the hash of the published {inception.WEIGHTS}: unless it was converted from "
                "that, the distance cannot be compared with others."
            )
        return found


@dataclass
class FrechetInception(_OnInception):
    name: ClassVar[str] = "fid"
    title: ClassVar[str] = "FID"
    formula: ClassVar[str] = "|m - r|² + tr(C + R - 2 (C R)^½), with mean m, r and covariance C, R of Inception's pool3 features"
    source: ClassVar[str] = "Heusel et al., arXiv 1706.08500; features as torch-fidelity and torchmetrics take them"


@dataclass
class KernelInception(_OnInception):
    name: ClassVar[str] = "kid"
    title: ClassVar[str] = "KID"
    formula: ClassVar[str] = (
        "unbiased squared MMD with the kernel (x·y / 2048 + 1)³ on Inception's pool3 features, mean over 100 subsets of 1,000"
    )
    source: ClassVar[str] = "Binkowski et al., arXiv 1801.01401; not multiplied by 1,000"

    biased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self._opened.moments is not None:
            raise UserError(f"reference={self.reference} has a mean and a covariance alone; KID needs a folder of pictures.")
        super().__post_init__()

    def _measured(self, features: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray]:
        return kernel_distance(features, reference), kernel_influence(features, reference)


@dataclass
class FrechetClip(_SetDistance):
    """CLIP-FD: Frechet's distance on a CLIP model's image features, which ImageNet's classes do not bind."""

    spec: str = field(kw_only=True)
    precision: str = "fp32"

    name: ClassVar[str] = "clip_fd"
    title: ClassVar[str] = "CLIP-FD"
    formula: ClassVar[str] = "|m - r|² + tr(C + R - 2 (C R)^½), with mean m, r and covariance C, R of CLIP's image features, not normalised"
    source: ClassVar[str] = (
        "Kynkäänniemi et al., arXiv 2203.06026; features as in clean-fid's CLIP-FID, resized as the CLIP model was trained"
    )

    def __post_init__(self) -> None:
        _ = self._opened  # a wrong reference is refused before anything is drawn

    def _identity(self) -> dict[str, Any]:
        return {"network": self.spec, "precision": self.precision, "weights": self._weights}

    @cached_property
    def _weights(self) -> str | None:
        return clip_weights(self.spec)

    def _extractor(self) -> Extractor:
        clip = load_clip(self.spec, self.device, self.precision)

        def features(pixels: torch.Tensor) -> torch.Tensor:
            return clip.model.encode_image(pixels.to(clip.device, clip.dtype))

        return Extractor(clip.prepare, features)
