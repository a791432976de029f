"""Starting from somebody else's U-Net: what fits is kept, the rest is said in a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import user_error
from diffusers import UNet2DConditionModel
from official_models import as_bin, make_official

from paradiffusion.checkpoints.layouts import is_unet_folder, open_layout
from paradiffusion.checkpoints.starting import fit

STEM = "diffusion_pytorch_model"
SDXL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny U-Net of SDXL's structure, in a pipeline's folder."""
    folder = tmp_path_factory.mktemp("sdxl")
    UNet2DConditionModel(**SDXL, **ADDED).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


def ours(**changes: object) -> dict[str, torch.Tensor]:
    """The model's own tensors: SDXL's U-Net without the added conditions, with the text projection."""
    unet = UNet2DConditionModel(**{**SDXL, "encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj", **changes})
    return {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}


def test_sdxl_keeps_all_but_the_text_projection(sdxl: Path) -> None:
    assert is_unet_folder(sdxl) and is_unet_folder(sdxl / "unet")
    own, stored = ours(), open_layout(sdxl).weights()
    assert all(torch.equal(stored[name], tensor) for name, tensor in open_layout(sdxl / "unet").weights().items())
    kept, report = fit(own, stored)
    assert own.keys() - kept.keys() == {"unet.encoder_hid_proj.weight", "unet.encoder_hid_proj.bias"}
    assert all(torch.equal(kept[name], stored[name]) for name in kept)
    assert len(report.splitlines()) == 3 and max(map(len, report.splitlines())) < 400
    assert f"{len(kept)} tensors" in report and "down_blocks.1" in report and "99." in report
    assert "fresh   2 tensors" in report and "encoder_hid_proj (2)" in report and "add_embedding (4)" in report


def test_other_shapes_and_other_kinds(sdxl: Path) -> None:
    stored = open_layout(sdxl).weights()
    kept, report = fit(ours(in_channels=6), stored)
    assert "unet.conv_in.weight" not in kept and report.count("has the shape") == 1
    assert "conv_in.weight has the shape (16, 4, 3, 3) there and (16, 6, 3, 3) here" in report
    user_error("none of the .* stored tensors fits", fit, {"unet.conv_in.weight": torch.zeros(1)}, stored)


def test_layers_under_lora_take_the_plain_weights(sdxl: Path) -> None:
    own = ours()
    layer = next(name for name in own if name.endswith("attn2.to_q.weight")).removesuffix(".weight")
    own[f"{layer}.base_layer.weight"] = own.pop(f"{layer}.weight")
    own[f"{layer}.lora_A.default.weight"] = torch.zeros(2, 2)
    stored = open_layout(sdxl).weights()
    kept, _ = fit(own, stored)
    assert torch.equal(kept[f"{layer}.base_layer.weight"], stored[f"{layer}.weight"])
    assert f"{layer}.lora_A.default.weight" not in kept


@pytest.mark.parametrize("form", ["shards", "fp16", "bin"])
def test_every_form_of_file(sdxl: Path, tmp_path: Path, form: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(sdxl / "unet")
    expected = open_layout(sdxl).weights()
    if form == "shards":
        unet.save_pretrained(tmp_path, max_shard_size="50KB")
    elif form == "fp16":
        unet.half().save_pretrained(tmp_path, variant="fp16")
    else:
        unet.save_pretrained(tmp_path)
        as_bin(tmp_path, STEM)
    assert not (tmp_path / f"{STEM}.safetensors").exists()
    found = open_layout(tmp_path).weights()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], atol=1e-3 if form == "fp16" else 0, rtol=0)
    if form == "shards":
        next(tmp_path.glob("*-00001-of-*.safetensors")).unlink()
        user_error("is not in .*copy the folder again", open_layout(tmp_path).weights)


def test_what_is_no_starting_point(tmp_path: Path, codec_folder: Path, sdxl: Path) -> None:
    assert not is_unet_folder(tmp_path) and not is_unet_folder(codec_folder)
    assert not is_unet_folder(make_official(tmp_path / "official", codec_folder))  # whole, so it is read whole
    assert is_unet_folder(tmp_path / "official" / "unet")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((sdxl / "unet" / "config.json").read_text())
    user_error("holds no weights of a UNet2DConditionModel", open_layout(empty).weights)
    (empty / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert not is_unet_folder(empty)
