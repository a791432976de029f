"""The published weights' layout: what is drawn equals what the libraries draw, whatever form the folder has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PARITY, user_error
from diffusers import UNet2DConditionModel
from official_models import as_bin, draw, make_official, make_unet, reference
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from paradiffusion.checkpoints.export import export_official, export_ours, export_pipeline
from paradiffusion.checkpoints.layouts import find_checkpoint, open_layout
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.sampling.sampler import sample_latents

CASE: dict[str, Any] = {
    "prompt": "a red circle at the left", "seed": 11, "height": 64, "width": 96, "steps": 6, "guidance": 5.0,
}  # fmt: skip
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"]}
ROUNDING = 0.5 / 255 + 2e-4  # of a PNG, and of arithmetic

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="the reference numbers (../shared/assets/parity) are not here")


def check(folder: Path, out: Path, *arguments: str, **case: Any) -> None:
    (image,) = draw(folder, [{**CASE, **case}], out, *arguments)
    expected = reference(folder, **{**CASE, **case}).numpy()
    assert expected.std() > 0.01 and np.abs(image - expected).max() < ROUNDING


@pytest.fixture
def make(tmp_path: Path, codec_folder: Path) -> Callable[..., Path]:
    return lambda lora=LORA, **scheduler: make_official(tmp_path / "weights", codec_folder, lora, **scheduler)


@needs_parity
def test_parity_with_the_released_code(tmp_path: Path) -> None:
    cases = json.loads((PARITY / "cases.json").read_text())
    expected = np.load(PARITY / "reference.npz")
    images = draw(PARITY / "weights", cases, tmp_path)
    models = load_models(find_checkpoint(PARITY / "weights"), device="cpu")
    for number, (case, image) in enumerate(zip(cases, images, strict=True)):
        assert np.abs(image - expected[f"image_{number}"][0]).max() < 0.002
        assert np.array_equal(models.text_encoder.tokenize([case["prompt"]]).ids.numpy(), expected[f"ids_{number}"])
        conditioning = models.encode([case["prompt"]])
        assert np.abs(conditioning.features.numpy() - expected[f"embed_{number}"].astype(np.float32)).max() < 0.001
        settings = models.sampler
        settings.steps, settings.guidance = case["steps"], case["guidance"]
        shape = (4, case["height"] // 8, case["width"] // 8)
        latents = sample_latents(models.denoise, models.objective, conditioning, [case["seed"]], shape, settings, "cpu", torch.float32)
        assert np.abs(latents.numpy() - expected[f"latent_{number}"]).max() < 0.01


@pytest.mark.parametrize(
    ("scheduler", "case"),
    [
        ({}, {"steps": 17, "seed": 2**40, "guidance": 9.0}),
        ({}, {"guidance": 0.5}),  # as any of one or less: none
        ({"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
        ({"timestep_spacing": "leading", "steps_offset": 0, "lower_order_final": False, "solver_order": 3, "solver_type": "heun"}, {}),
        ({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {}),
        ({"algorithm_type": "sde-dpmsolver++"}, {}),
        ({"algorithm_type": "dpmsolver"}, {}),
        ({"use_karras_sigmas": True}, {}),
        ({"prediction_type": "sample", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, {}),
    ],
)  # fmt: skip
def test_every_scheduler_setting_is_honoured(
    make: Callable[..., Path], tmp_path: Path, scheduler: dict[str, Any], case: dict[str, Any]
) -> None:
    check(make(**scheduler), tmp_path / "out", **case)


def test_an_autoencoder_elsewhere_has_its_own_scaling_factor(make: Callable[..., Path], tmp_path: Path, codec_folder: Path) -> None:
    """Also in what is exported from there."""
    folder = make(None)
    other = tmp_path / "vae"
    shutil.copytree(codec_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.7}))
    elsewhere = f"codec.path={other}"
    (image,) = draw(folder, [CASE], tmp_path / "out", elsewhere)
    shutil.rmtree(folder / "sdxl-vae-fp16-fix")
    shutil.copytree(other, folder / "sdxl-vae-fp16-fix")
    assert np.abs(image - reference(folder, **CASE).numpy()).max() < ROUNDING
    shutil.copytree(codec_folder, folder / "sdxl-vae-fp16-fix", dirs_exist_ok=True)
    layout = find_checkpoint(folder)
    layout.place(None, str(other))
    export_pipeline(layout, tmp_path / "pipe", frozen="link")
    pipe = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "pipe"))
    settings = {"num_inference_steps": CASE["steps"], "guidance_scale": CASE["guidance"]}
    sizes = {key: CASE[key] for key in ("height", "width")}
    drawn = pipe(CASE["prompt"], generator=torch.Generator().manual_seed(CASE["seed"]), **settings, **sizes).images[0]
    assert np.array_equal(np.asarray(drawn) / 255, image)
    user_error(r"codec\.path=.*nowhere holds no config\.json", draw, folder, [CASE], tmp_path / "no", f"codec.path={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1, "lora_alpha": 4, "target_modules": r".*\.(k_proj|down_proj)"},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "alpha_pattern": {"v_proj": 1}},
        {"r": 4, "lora_alpha": 2, "target_modules": ["v_proj"], "rank_pattern": {"v_proj": 2}, "use_dora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    ],
)
def test_every_kind_of_adapter(make: Callable[..., Path], tmp_path: Path, lora: dict[str, Any]) -> None:
    check(make(lora), tmp_path / "out")


def test_old_sharded_half_precision_and_moved_files(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make()
    as_bin(folder / "text_encoder_lora", "adapter_model")
    as_bin(folder / "sdxl-vae-fp16-fix", "diffusion_pytorch_model")
    model = AutoModel.from_pretrained(folder / "Llama-2-7b-hf", dtype=torch.float16)
    (folder / "Llama-2-7b-hf" / "model.safetensors").unlink()
    model.save_pretrained(folder / "Llama-2-7b-hf", max_shard_size="100KB")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").half()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    expected = reference(folder, **CASE).numpy()
    for name in ("Llama-2-7b-hf", "sdxl-vae-fp16-fix"):
        (folder / name).rename(tmp_path / name)
    elsewhere = (f"text_encoder.path={tmp_path / 'Llama-2-7b-hf'}", f"codec.path={tmp_path / 'sdxl-vae-fp16-fix'}")
    (image,) = draw(folder, [CASE], tmp_path / "out", *elsewhere)
    assert np.abs(image - expected).max() < ROUNDING
    user_error(r"text_encoder\.path|codec\.path", draw, folder, [CASE], tmp_path / "again")


def test_one_of_two_denoisers(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(None)
    width = json.loads((folder / "unet" / "config.json").read_text())["encoder_hid_dim"]
    make_unet(seed=5, width=width).save_pretrained(folder / "unet_384")
    (other,) = draw(folder, [CASE], tmp_path / "a", "unet=unet_384")
    assert np.abs(other - reference(folder, **CASE, unet="unet_384").numpy()).max() < ROUNDING
    check(folder, tmp_path / "b")
    user_error("no U-Net called unet_1024; choose one of unet=unet, unet_384", draw, folder, [CASE], tmp_path / "c", "unet=unet_1024")
    shutil.rmtree(folder / "unet")
    user_error("choose one of unet=unet_384", draw, folder, [CASE], tmp_path / "d")


def test_an_adapter_beside_its_own_denoiser(make: Callable[..., Path], tmp_path: Path, codec_folder: Path) -> None:
    """The published folder holds unet_1 and text_encoder_lora_1."""
    folder = make()
    other = make_official(tmp_path / "other", codec_folder, {"r": 1, "lora_alpha": 9, "target_modules": ["v_proj"]})
    shutil.copytree(folder / "unet", folder / "unet_1")
    (other / "text_encoder_lora").rename(folder / "text_encoder_lora_1")
    images = [draw(folder, [CASE], tmp_path / unet, f"unet={unet}")[0] for unet in ("unet", "unet_1")]
    for image, unet in zip(images, ("unet", "unet_1"), strict=True):
        assert np.abs(image - reference(folder, **CASE, unet=unet).numpy()).max() < ROUNDING
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_sizes_that_only_the_codec_limits(make: Callable[..., Path], tmp_path: Path) -> None:
    """Ordinary blocks are told the sizes to come to; the paper's double what they get, as the libraries' own do."""
    folder = make(None)
    user_error("multiple of 16", draw, folder, [{**CASE, "height": 72}], tmp_path / "a")
    width = json.loads((folder / "unet" / "config.json").read_text())["encoder_hid_dim"]
    shutil.rmtree(folder / "unet")
    make_unet(width=width, blocks="").save_pretrained(folder / "unet")
    check(folder, tmp_path / "b", height=72, width=40)


def test_a_unet_as_wide_as_the_language_model(make: Callable[..., Path], tmp_path: Path) -> None:
    """It has no projection of its own; also as a checkpoint of ours, a pipeline, and the official layout again."""
    folder = make()
    width = json.loads((folder / "Llama-2-7b-hf" / "config.json").read_text())["hidden_size"]
    shutil.rmtree(folder / "unet")
    make_unet(width=width, projection=False).save_pretrained(folder / "unet")
    check(folder, tmp_path / "out")
    layout = find_checkpoint(folder)
    for write in (export_ours, export_official, export_pipeline):
        write(layout, tmp_path / write.__name__, frozen="link")
        assert np.array_equal(*(draw(f, [CASE], tmp_path / f.name / "drawn")[0] for f in (folder, tmp_path / write.__name__)))
    other = tmp_path / "narrow"
    make_unet(width=width + 8, projection=False).save_pretrained(other)
    shutil.copytree(other, folder / "unet", dirs_exist_ok=True)
    user_error("holds no checkpoint", find_checkpoint, folder)


def test_what_the_folder_is_described_as(make: Callable[..., Path]) -> None:
    about = find_checkpoint(make()).description
    sampler, conditioning = about["sampler"], about["conditioning"]
    assert about["lora"] == {"rank": 3, "alpha": 6, "target_modules": ["o_proj", "q_proj", "up_proj"]}
    assert (sampler["steps"], sampler["guidance"], about["resolution"]) == (100, 7.5, 64)
    assert (conditioning["max_tokens"], conditioning["mask_padding"], conditioning["layer_tap"]) == (256, False, "last")
    assert not conditioning["clean_text"], "the released code reads text to the letter"
    assert about["step"] == 0 and about["coordinates"] == 0 and about["text_encoder"]["hash"] is None


def test_damaged_folders_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make()
    describe = lambda: open_layout(folder).description  # noqa: E731
    config = folder / "text_encoder_lora" / "adapter_config.json"
    whole = config.read_text()
    for change, words in (({"bias": "all"}, "bias=all"), ({"peft_type": "IA3"}, "peft_type=IA3")):
        config.write_text(json.dumps({**json.loads(whole), **change}))
        user_error(words, describe)
    config.write_text("{")
    user_error(r"adapter_config\.json could not be read", describe)
    config.write_text(whole)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, path)
    user_error(r"lacks 1 of the model's tensors, unet\.conv_in\.bias", load_models, open_layout(folder), device="cpu")
    path.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.bias": "../../secret.safetensors"}})
    )
    user_error(r"secret\.safetensors", open_layout(folder).weights)


def test_a_pickle_that_runs_code_is_not_run(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make()
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    (folder / "text_encoder_lora" / "adapter_model.safetensors").unlink()
    torch.save({"a": Trap()}, folder / "text_encoder_lora" / "adapter_model.bin")
    user_error(r"adapter_model\.bin could not be read", open_layout(folder).weights)
    assert not ran.exists()
