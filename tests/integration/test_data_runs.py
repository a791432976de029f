"""Runs on data that is not local shards: a folder of pictures, shards on a web server, and a stream of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import user_error
from remote_fixtures import serving
from training_runs import build_here, records, train_here

from paradiffusion.data.index import load_index
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.scenes.dataset import demo_samples

SIZE = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    load_index(write_shards(demo_samples("web", SIZE, 1), folder, 16))
    return folder


def arguments_of(tiny_arguments: list[str], run: Path, *more: str) -> list[str]:
    kept = [one for one in tiny_arguments if not one.startswith(("data.shards=", "data.val_shards=", "data=", "data.demo"))]
    own = ["stage=1", f"run_dir={run}", "max_steps=4", "validate_every=1000", "checkpoint_every=4", "log_every=1"]
    return [*kept, *own, *more]


def test_a_folder_of_pictures(tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for one in demo_samples("web", SIZE, 1):
        (pictures / f"{one.key}.{one.extension}").write_bytes(one.image)
        (pictures / f"{one.key}.txt").write_text(one.meta["captions"]["short"])
    arguments = arguments_of(tiny_arguments, tmp_path / "run", f"data.folder={pictures}")
    assert train_here(arguments) == 0
    assert f"data: {SIZE} samples in 1 shards" in capsys.readouterr().out
    assert [row["step"] for row in records(tmp_path / "run" / "stage1")] == [1, 2, 3, 4]
    assert train_here([*arguments, "max_steps=5"]) == 0  # The same data, found again.
    stage = tmp_path / "run" / "stage1"
    caption, picture = pictures / f"{one.key}.txt", pictures / f"{one.key}.{one.extension}"
    before = caption.read_text(), picture.read_bytes()
    other = next(path for path in pictures.glob(f"*.{one.extension}") if path != picture)
    for path, content in ((caption, before[0].swapcase().encode()), (picture, other.read_bytes())):
        path.write_bytes(content)  # as many words, and a picture of the same sides
        user_error(r"the data has changed since .* \(samples, captions, pictures", train_here, [*arguments, "max_steps=6"])
        caption.write_text(before[0])
        picture.write_bytes(before[1])
    shutil.copy(picture, pictures / f"added.{one.extension}")
    (pictures / "added.txt").write_text("one picture more")
    user_error(r"^the data has changed since .* run_dir=<new folder> init_from=", train_here, [*arguments, "max_steps=6"])
    assert train_here([*arguments, f"run_dir={tmp_path / 'more'}", f"init_from={stage}", "max_steps=1"]) == 0


def test_held_out_pictures_of_a_folder_some_of_which_cannot_be_read(
    shards: Path, tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held out"
    held_out.mkdir()
    for one in demo_samples("val", 3, 0):
        (held_out / f"{one.key}.{one.extension}").write_bytes(one.image)
        (held_out / f"{one.key}.txt").write_text(one.meta["captions"]["short"])
    first = sorted(held_out.glob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:200])  # its size can be read, and nothing else
    own = (f"data.folder={held_out}", f"data.val_shards={held_out}", "validation.samples=3", "max_steps=1", "batch_size=2",
           "data.max_bad_fraction=1")  # fmt: skip
    assert train_here(arguments_of(tiny_arguments, tmp_path / "run", *own)) == 0
    said = capsys.readouterr().out
    assert f"warning: 1 samples of data.val_shards cannot be read, held out/{first.name} (" in said
    for path in held_out.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"no sample of data\.val_shards can be read, held out/"):
        train_here(arguments_of(tiny_arguments, tmp_path / "none", f"data.shards={shards}", *own[1:]))


def test_a_stream(tiny_arguments: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(shards) as server:
        spec = f"data.shards={server.url}{{000000..000002}}.tar"
        (shards / "000001.index.npz").rename(tmp_path / "aside.npz")
        with pytest.raises(UserError, match=r"index_shards.py .*data.streaming=true"):
            train_here(arguments_of(tiny_arguments, tmp_path / "run", spec))
        arguments = arguments_of(tiny_arguments, tmp_path / "run", spec, "data.streaming=true")
        capsys.readouterr()
        assert train_here(arguments) == 0
        told = capsys.readouterr().out
        assert "STREAMING, not exactly resumable" in told
        assert train_here([*arguments, "max_steps=6"]) == 0
    assert [row["step"] for row in records(tmp_path / "run" / "stage1")] == [1, 2, 3, 4, 5, 6]


def test_several_resolutions(shards: Path, tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scenes of 64x64 pixels stay what they are, and the wide and tall ones, which have fewer, are not enlarged."""
    own = (f"data.shards={shards}", "data.lower_resolutions=[48]", "log_samples=true", "max_steps=8")
    assert train_here(arguments_of(tiny_arguments, tmp_path / "run", *own)) == 0
    assert "48x48" in (said := capsys.readouterr().out) and "64x64" in said
    setup = build_here(arguments_of(tiny_arguments, tmp_path / "other", *own))
    sizes = {bucket: count for bucket, count in setup.plan.bucket_sizes().items() if count}
    shapes = {tuple(batch.pixels.shape[2:]) for batch in setup.loader()}
    setup.close()
    assert (64, 64) in sizes and min(tall * wide for tall, wide in sizes) < 0.7 * 64 * 64 and shapes <= set(sizes)
    with pytest.raises(UserError, match=r"was begun with data\.lower_resolutions=\[48\]"):
        train_here(arguments_of(tiny_arguments, tmp_path / "run", own[0], "max_steps=9"))
