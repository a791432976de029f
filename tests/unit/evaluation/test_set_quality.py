"""FID, KID and CLIP-FD: distances that are known, the network's layout, features that are kept, and the scores over pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import user_error
from judged_scenes import Alone
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import nn
from torchvision.models import Inception3

from paradiffusion.evaluation.estimates import mean
from paradiffusion.evaluation.records import Drawn
from paradiffusion.evaluation.scores import set_quality as frechet
from paradiffusion.evaluation.scores.image_features import Extractor, image_features, read_features
from paradiffusion.evaluation.scores.set_quality import FrechetClip, FrechetInception, KernelInception, open_reference
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics import inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published ones."""
    generator = torch.Generator().manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)  # its layers have the names of the published
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS
    torch.save(network.state_dict(), path)
    return path


def picture(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_features_do_not_depend_on_the_batch(weights: Path, tmp_path: Path) -> None:
    network = inception.load_inception(weights)
    pixels = torch.stack([inception.prepare(picture(seed, 30 + seed)) for seed in range(3)])
    together = network.features(pixels)
    assert together.shape == (3, 2048) and together.dtype == torch.float32 and together.std() > 0.01
    assert torch.allclose(network.features(pixels[1:2])[0], together[1], atol=1e-4)
    # As our own network of the published graph gave them, before torch-fidelity's.
    before = [[0.031442, 0.003986, 0.0], [0.031839, 0.003303, 0.0], [0.025955, 0.002972, 0.000202]]
    assert torch.allclose(together[:, ::700], torch.tensor(before), atol=1e-5)
    assert float(together.mean()) == pytest.approx(0.165335685, abs=1e-6)
    state = torch.load(weights, weights_only=True)
    plain = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    save_file(plain, tmp_path / "converted.safetensors")
    again = inception.load_inception(tmp_path / "converted.safetensors").features(pixels)
    assert torch.equal(again, together)


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    wrong: dict[str, Any] = {
        "1000 classes": Inception3(init_weights=False).state_dict(),
        'Missing key.* in state_dict: "fc.bias"': {name: v for name, v in state.items() if name != "fc.bias"},
        'Unexpected key.* in state_dict: "extra"': {**state, "extra": torch.zeros(1)},
        r"size mismatch for Mixed_7b.branch1x1.bn.bias.* torch.Size\(\[3\]\)": {**state, "Mixed_7b.branch1x1.bn.bias": torch.zeros(3)},
        "not finite": {**state, "fc.weight": torch.full((1008, 2048), torch.nan)},
        "not the FID's Inception": [1, 2],
        "no file of weights alone": Path,
    }
    for said, content in wrong.items():
        torch.save(content, tmp_path / "other.pth")
        caught = user_error(said, inception.load_inception, tmp_path / "other.pth")
        assert inception.WEIGHTS in caught
    (tmp_path / "empty.safetensors").touch()
    for name in ("none.pth", "empty.safetensors"):
        user_error("no file|cannot be read", inception.load_inception, tmp_path / name)


def drawn(folder: Path, count: int, per_prompt: int = 1) -> list[Drawn]:
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number in range(count):
        file = folder / f"{number:05d}.png"
        picture(number).save(file)
        images.append(Drawn(f"{number:05d}", f"p{number // per_prompt}", file))
    return images


def suite_of(images: list[Drawn]) -> Suite:
    return Suite("s", "S", tuple(SuitePrompt(name, name) for name in dict.fromkeys(image.prompt for image in images)))


def corner(seen: list[int] | None = None) -> Extractor:
    """The first two pixels' reds, and how many pictures were looked at."""

    def features(pixels: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(len(pixels))
        return pixels[:, 0, :2, 0].float()

    return Extractor(lambda image: torch.from_numpy(np.array(image)), features)


def test_features_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.evaluation.scores.image_features._SECONDS", 0.0)
    images, seen, work = drawn(tmp_path / "images", 10), [], tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        image_features(images, corner(seen), work, Alone(stop_after=1), batch_size=3)
    assert sum(seen) == 6
    for rank in range(2):  # and on another number of processes
        image_features(images[rank::2], corner(seen), work, Alone(rank, 2), batch_size=3)
    assert sum(seen) == 10
    names, features, errors = read_features(work, [image.name for image in images])
    assert names == [image.name for image in images] and not errors and features.dtype == np.float32
    assert features.tolist() == [np.array(picture(number))[0, :2, 0].tolist() for number in range(10)]
    assert read_features(work, [names[4], "other"])[2] == {"other": "no features were made"}
    broken = Extractor(corner().prepare, lambda pixels: torch.full((len(pixels), 2), torch.nan))
    image_features(images, broken, tmp_path / "broken", Alone())
    found, features, errors = read_features(tmp_path / "broken", names[:2])
    assert not found and features.shape == (0, 0) and set(errors.values()) == {"its features are not finite"}


def test_what_cannot_be_read_is_noted_and_looked_at_again_once_it_changes(tmp_path: Path) -> None:
    images, seen, work = drawn(tmp_path / "images", 4), [], tmp_path / "work"
    images[1].file.write_bytes(b"no picture")
    images[2].file.unlink()
    images.append(Drawn("00004", "p4", tmp_path / "none.png", error="the model refused"))

    def found() -> tuple[list[str], np.ndarray, dict[str, str]]:
        image_features(images, corner(seen), work, Alone(), batch_size=2)
        return read_features(work, [image.name for image in images])

    names, features, errors = found()
    assert names == ["00000", "00003"] and features.shape == (2, 2)
    assert "does not decode" in errors["00001"] and "No such file" in errors["00002"]
    assert errors["00004"] == "the model refused"
    assert found()[0] == names and sum(seen) == 2 and len(list(work.iterdir())) == 1, "nothing is done twice"
    picture(77).save(images[1].file)
    names, features, errors = found()
    assert "00001" in names and features[1].tolist() == np.array(picture(77))[0, :2, 0].tolist() and sum(seen) == 3
    min(work.iterdir()).write_bytes(b"torn")
    assert found()[0] == names, "a damaged file is made again"


def test_fid_and_kid_of_pictures(weights: Path, tmp_path: Path) -> None:
    images, made = drawn(tmp_path / "images", 3), tmp_path / "scores"
    fid, kid = (kind(tmp_path / "images", weights=weights) for kind in (FrechetInception, KernelInception))
    result, near = (scored(score, images, made / score.name) for score in (fid, kid))
    kept = sorted(path.name for path in (made / "features").rglob("*.safetensors"))
    assert len(kept) == 2, "both read the same features, of the images and of the reference"
    found = result.overall["fid"]
    assert found.mean == pytest.approx(0, abs=1e-6) and found.low >= 0 and (found.n, found.prompts) == (3, 3)
    assert result.measures[0].worst is None and not result.measures[0].higher_is_better
    assert "not the hash of the published" in result.warnings[-1]
    assert "3 images, fewer than 2,000" in result.warnings[0] and "full rank" in result.warnings[0]
    features = read_features(next(p.parent for p in (made / "features").glob("[!r]*/*")), ["00000", "00002"])[1]
    assert features.shape == (2, 2048)
    assert near.overall["kid"].mean < 0, "a set without itself is further from itself than it is with itself"
    assert "subsets are of 3" in " ".join(near.warnings) and near.settings["features"] == result.settings["features"]


def scored(score: Any, images: list[Drawn], work: Path, processes: int = 1) -> Any:
    for rank in range(processes):
        score.prepare(suite_of(images), images[rank::processes], work, Alone(rank, processes))
    return score.result(suite_of(images), images, work)


def test_clip_fd_of_a_folder_and_of_its_statistics(clip_folder: Path, tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", 30, per_prompt=2)
    other = tmp_path / "real"
    for number in range(25):
        (other / "deep").mkdir(parents=True, exist_ok=True)
        picture(1000 + number).point(lambda value: value // 2).save(other / "deep" / f"{number}.jpg")
    score = FrechetClip(other, spec=str(clip_folder), cache=tmp_path / "cache")
    result = scored(score, images, tmp_path / "one" / "clip_fd")
    found = result.overall["clip_fd"]
    assert found.low <= found.mean <= found.high and (found.n, found.prompts) == (30, 15) and found.mean > 0
    assert any("30 images are of 15 prompts" in warning for warning in result.warnings)
    two = scored(FrechetClip(other, spec=str(clip_folder)), images, tmp_path / "two" / "clip_fd", processes=2)
    assert two.overall["clip_fd"].mean == pytest.approx(found.mean, rel=1e-5)
    for folder, whole in (("reference-*", 25), ("[!r]*", 30)):
        shares = [len(load_file(path)["features"]) for path in (tmp_path / "two" / "features").glob(f"{folder}/*")]
        assert sorted(shares) == [whole // 2, whole - whole // 2], "each process looks at its share"

    names = [image.name for image in open_reference(other).images]
    features = read_features(next((tmp_path / "cache").iterdir()), names)[1].astype(np.float64)
    np.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    by_file = FrechetClip(tmp_path / "real.npz", spec=str(clip_folder))
    known = scored(by_file, images, tmp_path / "three" / "clip_fd").overall["clip_fd"]
    assert known.mean == pytest.approx(found.mean, rel=1e-6)
    half = FrechetClip(other, spec=str(clip_folder), precision="bf16")
    near = scored(half, images, tmp_path / "half" / "clip_fd").overall["clip_fd"]
    assert near.mean == pytest.approx(found.mean, rel=0.2)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    skipped = scored(FrechetClip(tmp_path / "wide.npz", spec=str(clip_folder)), images, tmp_path / "four" / "clip_fd")
    assert "3 features" in skipped.skipped and not skipped.overall


def test_failures_are_listed_and_two_images_are_needed(clip_folder: Path, tmp_path: Path) -> None:
    images, reference = drawn(tmp_path / "images", 5), tmp_path / "real"
    drawn(reference, 3)
    (reference / "broken.png").write_bytes(b"no")
    # The overview of a drawn folder is no picture of it.
    picture(9).save(reference / "grid.png")
    assert "grid.png" in [image.name for image in open_reference(reference).images]
    (reference / "manifest.jsonl").write_text("")
    images[0].file.unlink()
    score = FrechetClip(reference, spec=str(clip_folder))
    result = scored(score, images, tmp_path / "scores" / "clip_fd")
    assert [(row.image, row.values) for row in result.images] == [("00000", {})] and result.images[0].error
    assert result.overall["clip_fd"].n == 4
    assert any("1 of 5 images failed" in text for text in result.warnings)
    assert any("1 of 4 pictures of the reference" in text for text in result.warnings)
    alone = scored(score, images[:2], tmp_path / "few" / "clip_fd")
    assert "1 of 2 images" in alone.skipped and not alone.overall and alone.images


@pytest.mark.parametrize(
    ("name", "said", "arrays"),
    [
        ("none", "no such folder", None), ("empty", "0 pictures", None), ("torn.npz", "cannot be used", b"PK\x03\x04"),
        ("half.npz", "no sigma", {"mu": np.zeros(3)}), ("odd.npz", "do not fit", {"mu": np.zeros(3), "sigma": np.ones((2, 2))}),
        ("negative.npz", "symmetric", {"mu": np.zeros(2), "sigma": -np.eye(2)}),
        ("nan.npz", "not finite", {"mu": np.full(2, np.nan), "sigma": np.eye(2)}),
        ("objects.npz", "cannot be used", {"mu": np.array([{}], dtype=object), "sigma": np.eye(2)}),
    ],
)  # fmt: skip
def test_a_wrong_reference_is_refused_at_once(name: str, said: str, arrays: Any, tmp_path: Path) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    elif isinstance(arrays, bytes):
        (tmp_path / name).write_bytes(arrays)
    elif arrays:
        np.savez(tmp_path / name, **arrays)
    user_error(said, FrechetClip, tmp_path / name, spec="unused")


def test_statistics_of_other_features_are_refused(weights: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(2), sigma=np.eye(2))
    user_error("2 features where the FID's are of 2048", FrechetInception, tmp_path / "narrow.npz", weights=weights)
    user_error("KID needs a folder", KernelInception, tmp_path / "narrow.npz", weights=weights)


def test_the_resize_is_that_of_the_published_graph() -> None:
    """TensorFlow's first, which smooths nothing."""
    grey = inception.prepare(Image.new("RGB", (7, 5), (0, 128, 255)))
    assert tuple(grey.shape) == (3, 299, 299)
    assert grey[:, 3, 5].tolist() == pytest.approx([-1.0, 0.0, 127 / 128])
    steps = inception.prepare(Image.fromarray(np.array([[[0] * 3, [128] * 3]], dtype=np.uint8)))[0, 0]
    assert steps[:3].tolist() == pytest.approx([-1, -1 + 2 / 299, -1 + 4 / 299]) and steps[150:].tolist() == [0.0] * 149


def spread(rng: np.random.Generator, width: int) -> np.ndarray:
    turn = rng.normal(size=(width, width))
    return turn @ turn.T / width + 0.1 * np.eye(width)


def test_frechet_is_symmetric_0_to_itself_and_agrees_with_the_matrix_root() -> None:
    rng = np.random.default_rng(1)
    for p, q in (
        (rng.normal(size=(300, 6)) @ spread(rng, 6), rng.normal(size=(200, 6)) + 0.3),
        (rng.normal(size=(10, 64)), rng.normal(size=(500, 64))),  # fewer images than features: a singular matrix
    ):
        one, other = frechet.gaussian(p), frechet.gaussian(q)
        c, d = np.cov(p, rowvar=False), np.cov(q, rowvar=False)
        half = linalg.sqrtm(d).real
        roots = np.sqrt(np.linalg.eigvalsh(half @ c @ half).clip(min=0))
        expected = ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(c + d) - 2 * roots.sum()
        assert frechet.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
        assert frechet.frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
        assert frechet.frechet_distance(one, frechet.gaussian_from_moments(q.mean(0), d)) == pytest.approx(expected)
        assert frechet.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="1 features"):
        frechet.gaussian(p[:1])


def test_what_an_image_adds_is_the_derivative() -> None:
    rng = np.random.default_rng(3)
    rows, reference = rng.normal(size=(30, 5)) * 2 + 1, frechet.gaussian(rng.normal(size=(90, 5)))
    found = frechet.frechet_influence(rows, reference)

    def weighted(weights: np.ndarray) -> float:
        center = weights @ rows
        factor = np.sqrt(weights * 30 / 29)[:, None] * (rows - center)
        return frechet.frechet_distance(frechet.Gaussian(center, factor), reference)

    even, step = np.full(30, 1 / 30), 1e-6
    for image in (0, 7, 29):
        moved = even * (1 - step) + step * (np.arange(30) == image)
        assert found[image] == pytest.approx((weighted(moved) - weighted(even)) / step, rel=1e-3, abs=1e-3)
    assert found.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(150, 12), (40, 64)])
def test_the_interval_covers_the_distance_of_as_many_images(count: int, width: int) -> None:
    rng = np.random.default_rng(4)
    reference = frechet.gaussian(rng.normal(size=(1000, width)))
    names = [str(number) for number in range(count)]
    found, low, high = [], [], []
    for seed in range(100):
        rows = 1.2 * rng.normal(size=(count, width)) + 0.15
        around = mean(frechet.frechet_influence(rows, reference).tolist(), names, seed)
        found.append(frechet.frechet_distance(frechet.gaussian(rows), reference))
        low.append(found[-1] + around.low)
        high.append(found[-1] + around.high)
    truth = np.mean(found)
    assert np.mean((np.array(low) <= truth) & (truth <= np.array(high))) >= 0.92
    assert np.mean(np.array(high) - np.array(low)) < 4 * 1.8 * np.std(found), "it is not made safe by being wide"


@pytest.mark.parametrize(
    ("count", "fid", "kid", "kid_of_subsets", "around_fid", "around_kid"),
    [
        (60, 1.5826746496, 0.7505857557, 0.9496959959, (-0.4106665782, 0.4285013455), (-0.3121780084, 0.2987090292)),
        (9, 5.5778186272, 1.5559925517, 1.4981788730, (-0.8538307509, 1.5278974393), (-1.2587754535, 1.2589522732)),
    ],
)
def test_values_are_those_of_our_own_formulas_before_torchmetrics(
    count: int, fid: float, kid: float, kid_of_subsets: float, around_fid: tuple[float, float], around_kid: tuple[float, float]
) -> None:
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(16, 16)) / 4
    made = (np.abs(rng.normal(size=(60, 16))) @ mix + 0.2).astype(np.float32)[:count]
    real = (np.abs(rng.normal(size=(90, 16))) @ mix).astype(np.float32)[: count + 30]
    prompts = [f"p{number // 3}" for number in range(count)]
    reference = frechet.gaussian(real)
    assert frechet.frechet_distance(frechet.gaussian(made), reference) == pytest.approx(fid, abs=1e-6)
    assert frechet.kernel_distance(made, real) == pytest.approx(kid, abs=1e-6)
    assert frechet.kernel_distance(made, real, subsets=20, size=8, seed=1) == pytest.approx(kid_of_subsets, abs=1e-6)
    near = mean(frechet.frechet_influence(made, reference).tolist(), prompts)
    assert (near.low, near.high) == pytest.approx(around_fid, abs=1e-6)
    near = mean(frechet.kernel_influence(made, real).tolist(), prompts)
    assert (near.low, near.high) == pytest.approx(around_kid, abs=1e-6)


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(rows: np.ndarray) -> float:
        pairs = [k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    return within(a) + within(b) - 2 * float(np.mean([k(x, y) for x in a for y in b]))


def test_kid_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5
    assert frechet.kernel_distance(a, b) == pytest.approx(brute_force(a, b), rel=1e-9)
    assert frechet.kernel_influence(a, b).mean() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="1 and 9"):
        frechet.kernel_distance(a[:1], b)


def test_kid_takes_subsets_without_repeating_and_is_unbiased() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(400, 4)), rng.normal(size=(300, 4)) + 0.5
    whole = frechet.kernel_distance(a, b[:300], subsets=1, size=10**9)
    found = frechet.kernel_distance(a, b, subsets=200, size=100)
    assert found == frechet.kernel_distance(a, b, subsets=200, size=100) != whole
    assert found == pytest.approx(brute_force(a[:150], b[:150]), rel=0.5) and found > 0.1
    same = [frechet.kernel_distance(*rng.normal(size=(2, 60, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200) and min(same) < 0
