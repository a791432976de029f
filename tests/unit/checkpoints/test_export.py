"""Other layouts and back: equal tensors, equal images, and one sentence where a layout has no place for a model."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from official_models import MODERN, latents, make_official, make_ours, reference, same
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paradiffusion.checkpoints.export import export_official, export_ours, export_pipeline, official_differs
from paradiffusion.checkpoints.layouts import find_checkpoint, open_layout
from paradiffusion.checkpoints.manifest import find_fault
from paradiffusion.config import ConditioningConfig, ObjectiveConfig, UNetConfig
from paradiffusion.errors import UserError
from paradiffusion.sampling.pipeline import load_models
from scripts.export import main as export
from scripts.publish import main as publish

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}


def test_official_to_ours_and_back(tmp_path: Path, codec_folder: Path) -> None:
    folder = make_official(tmp_path / "weights", codec_folder, LORA, prediction_type="v_prediction")
    export_ours(open_layout(folder), tmp_path / "ours")
    assert find_fault(tmp_path / "ours") is None
    export_official(open_layout(tmp_path / "ours"), tmp_path / "again", frozen="link")
    states = [open_layout(tmp_path / name).weights() for name in ("weights", "ours", "again")]
    assert same(states[0], states[1]) and same(states[0], states[2])
    drawn = [latents(tmp_path / name) for name in ("weights", "ours", "again")]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    case: dict[str, Any] = {"prompt": "a", "seed": 1, "height": 64, "width": 64, "steps": 3, "guidance": 2.0}
    assert torch.equal(reference(folder, **case), reference(tmp_path / "again", **case))  # what others make of it
    with pytest.raises(UserError, match="exists already"):
        export_ours(open_layout(folder), tmp_path / "ours")


def test_ours_to_official_keeps_what_it_has_no_place_for(tmp_path: Path, codec_folder: Path) -> None:
    ours = make_ours(tmp_path / "ours", codec_folder, conditioning=ConditioningConfig(max_tokens=32))
    export_official(open_layout(ours), tmp_path / "weights", frozen="copy")
    assert same(open_layout(ours).weights(), open_layout(tmp_path / "weights").weights())
    assert torch.equal(latents(ours), latents(tmp_path / "weights"))
    descriptions = [open_layout(folder).description for folder in (ours, tmp_path / "weights")]
    for key in ("conditioning", "sampler", "resolution", "step", "objective", "lora", "stage"):
        values = [about[key] for about in descriptions]
        before, after = ({**v, "name": ""} if isinstance(v, dict) else v for v in values)
        assert before == after, key
    assert str(tmp_path) not in (tmp_path / "weights" / "paradiffusion.json").read_text()
    config = json.loads((tmp_path / "weights" / "unet" / "config.json").read_text())
    assert config["sample_size"] * 8 == descriptions[0]["resolution"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (MODERN, "a refiner .*, averaged layers .*, masked padding, coordinates .*, a flow objective"),
        ({"conditioning": ConditioningConfig(prefix="Draw:")}, "an instruction before each prompt, which"),
        ({"conditioning": ConditioningConfig(mask_padding=True)}, "place for masked padding, which"),
        ({"unet": UNetConfig(coordinates=1)}, "place for coordinates as input channels, which"),
        ({"objective": ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)}, "zero terminal SNR"),
    ],
)
def test_what_the_official_layout_has_no_place_for(
    tmp_path: Path, codec_folder: Path, changes: dict[str, Any], words: str
) -> None:
    ours = make_ours(tmp_path / "ours", codec_folder, **changes)
    with pytest.raises(UserError, match=words):
        export_official(open_layout(ours), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_lora_of_the_unet_is_stored_apart_and_merged(tmp_path: Path, codec_folder: Path) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = UNetConfig(lora_rank=2, lora_alpha=6, lora_target_modules=targets)
    folder = make_ours(tmp_path / "ours", codec_folder, unet=lora)
    plain = make_ours(tmp_path / "plain", codec_folder)
    assert open_layout(folder).description["unet_lora"] == {"rank": 2, "alpha": 6, "target_modules": targets}
    assert open_layout(plain).description["unet_lora"] is None and not (plain / "unet_lora").exists()
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_file(plain / "unet" / "diffusion_pytorch_model.safetensors"))
    state = open_layout(folder).weights(merge=False)
    layer = next(name for name in state if name.endswith("to_q.base_layer.weight")).removesuffix(".base_layer.weight")
    down, up = (state[f"{layer}.lora_{half}.default.weight"] for half in "AB")
    merged = state[f"{layer}.base_layer.weight"] + 3.0 * up @ down
    unet = load_models(open_layout(folder), device="cpu").joint.unet.state_dict()
    torch.testing.assert_close(unet[f"{layer.removeprefix('unet.')}.weight"], merged, atol=1e-6, rtol=0)
    assert not any(".lora_" in name for name in unet) and up.abs().sum() > 0
    export_ours(open_layout(folder), tmp_path / "published", frozen="none")
    assert not (tmp_path / "published" / "unet_lora").exists()
    assert torch.equal(latents(folder), latents(tmp_path / "published", codec_folder))
    # PEFT loads it by itself, and diffusers by either prefix.
    base = UNet2DConditionModel.from_pretrained(folder / "unet")
    for name, tensor in PeftModel.from_pretrained(base, folder / "unet_lora").merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, unet[name], atol=1e-6, rtol=0)
    for prefix in (None, "unet"):
        base = UNet2DConditionModel.from_pretrained(folder / "unet")
        base.load_lora_adapter(folder / "unet_lora", prefix=prefix, weight_name="adapter_model.safetensors")
        base.fuse_lora()
        fused = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
        for name, tensor in unet.items():
            torch.testing.assert_close(fused[name], tensor, atol=1e-6, rtol=0)
    # As versions before wrote it, under PEFT's names alone.
    stored = load_file(folder / "unet_lora" / "adapter_model.safetensors")
    old = {name: tensor for name, tensor in stored.items() if name.startswith("base_model.model.")}
    assert len(stored) == 3 * len(old)
    save_file(old, folder / "unet_lora" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in open_layout(folder).weights(merge=False).items())


def test_publishing_says_nothing_of_this_machine(tmp_path: Path, codec_folder: Path) -> None:
    folder = make_ours(tmp_path / "ours", codec_folder, **MODERN)
    for name, more in (("out", []), ("larger", ["--resolution", "96"])):
        publish(["--ckpt", str(folder), "--output", str(tmp_path / name), "--dtype", "bfloat16", *more])
    sizes = [sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (tmp_path / "out", folder)]
    assert sizes[0] < 0.7 * sizes[1]
    assert str(codec_folder) not in (tmp_path / "out" / "checkpoint.json").read_text()
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert all(tensor.dtype == torch.float32 for tensor in open_layout(tmp_path / "out").weights().values())
    out, larger = (open_layout(tmp_path / name).description for name in ("out", "larger"))
    assert larger == {**out, "resolution": 96}
    export_ours(open_layout(folder), tmp_path / "linked")
    assert str(codec_folder) in (tmp_path / "linked" / "checkpoint.json").read_text()
    assert torch.equal(latents(folder), latents(tmp_path / "linked"))


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path, codec_folder: Path) -> None:
    folder = make_ours(tmp_path / "ours", codec_folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format_version"] == 1
    path.write_text(json.dumps({"files": manifest["files"]}))
    assert find_fault(folder) is None  # written before there was a version
    path.write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match="format_version 2, newer than 1"):
        find_checkpoint(folder)
    path.write_text(json.dumps({**manifest, "format_version": "x"}))
    assert find_fault(folder) == "manifest.json is not readable"


def test_an_export_is_whole_or_not_there(tmp_path: Path, codec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and a place where nothing can be written."""
    weights = open_layout(make_ours(tmp_path / "ours", codec_folder))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"could not be written \(Not a directory\)"):
        export_ours(weights, tmp_path / "file" / "below")
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
    monkeypatch.setattr("peft.LoraConfig.save_pretrained", full)
    for write in (
        lambda folder: export_ours(weights, folder),
        lambda folder: export_official(weights, folder, frozen="link"),
        lambda folder: export_pipeline(weights, folder),
    ):
        with pytest.raises(UserError, match="No space left on device.*nothing is left of it"):
            write(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours"]
    assert (tmp_path / "file").read_text() == "precious"


def test_the_command_line(
    tmp_path: Path, codec_folder: Path, command: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = f"ckpt={make_ours(tmp_path / 'ours', codec_folder)}"
    assert export([ours, "to=official", f"output={tmp_path / 'w'}", "frozen=none", "dtype=float16"]) == 0
    said = capsys.readouterr().out
    assert "in the layout official" in said
    assert said.count("the released code: ") == 2 and "16 bits" in said and "to the letter" in said
    longer = open_layout(tmp_path / "ours")
    longer.description["conditioning"] |= {"max_tokens": 512, "clean_text": False}
    assert official_differs(longer, "float32") == [
        "it reads 256 tokens of a prompt, and this checkpoint 512: set that number there"
    ]
    found = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert found == ["paradiffusion.json", "scheduler", "text_encoder_lora", "unet"]
    for arguments, words in (
        (["to=onnx", ours, "output=x"], "official, pipeline, ours"),
        (["ckpt=x", "to=ours", "out=y"], "the keys are ckpt, to, output"),
        ([ours, "to=ours", f"output={tmp_path / 'z'}", "text_encoder.path=/nowhere"], "holds no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            export(arguments)
    refused = command("scripts/export.py", "ckpt=x", "output=y")
    assert refused.returncode == 2 and "to= is missing" in refused.stderr and "Traceback" not in refused.stderr
