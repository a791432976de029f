"""Checkpoints as others see them: the same predictions after a round trip, in the layouts of diffusers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_unet import TINY_UNET
from transformers import AutoModel

from paradiffusion.checkpoints.layouts import describe, find_checkpoint, open_layout, save_weights
from paradiffusion.checkpoints.manifest import write_manifest
from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    FrozenConfig,
    LoraConfig,
    SampleConfig,
    TextEncoderConfig,
    TrainConfig,
    UNetConfig,
)  # fmt: skip
from paradiffusion.errors import UserError
from paradiffusion.models.codec import load_codec
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.text.encoder import TextEncoder, attach_lora, load_text_encoder
from paradiffusion.text.sources import locate
from paradiffusion.training.start import check_init

ARMS = {
    "paper": ConditioningConfig(max_tokens=32),
    "modern": ConditioningConfig(
        name="modern", layer_tap="mean", projection="refiner", refiner_width=16, refiner_layers=1, refiner_heads=2, refiner_kernel=3,
        layout_patch=2, mask_padding=True, max_tokens=32
    ),
}  # fmt: skip
PROMPTS = ["a red circle at the left", ""]

# (arm, with LoRA) -> the checkpoint's folder and the models that were written to it
Made = tuple[Path, JointModel, TextEncoder]


@pytest.fixture
def make(codec_folder: Path, tmp_path: Path) -> Callable[..., Made]:
    def run(arm: str, lora: bool, name: str = "checkpoint") -> Made:
        config = TrainConfig(
            train_text="lora" if lora else "frozen",
            text_encoder=TextEncoderConfig(),
            conditioning=ARMS[arm],
            lora=LoraConfig(rank=2, alpha=6, target_modules=["v_proj", "q_proj", "o_proj"]),
            unet=UNetConfig(arguments=TINY_UNET, coordinates=2 * (arm == "modern")),
            codec=CodecConfig(path=str(codec_folder)),
        )
        encoder, codec = load_text_encoder(config.text_encoder, config.conditioning), load_codec(config.codec)
        if lora:
            attach_lora(encoder, config.lora)
        joint = build_joint(config, encoder.width, encoder if lora else None).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in joint.trained().values():  # away from zeros, such as lora_B's
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            if joint.refiner is not None:
                joint.refiner.mean += 0.3
                joint.refiner.std *= 2
        state = {n: p.detach() for n, p in joint.trained().items()}
        folder = tmp_path / name
        save_weights(folder, joint, state, describe(config, 5, encoder.source, codec.source))
        return folder, joint, encoder

    return run


@torch.no_grad()
def predict(joint: JointModel, encoder: TextEncoder) -> torch.Tensor:
    tokens = encoder.tokenize(PROMPTS)
    mask = encoder.feature_mask(tokens)
    features = joint.refine(encoder(tokens.ids, tokens.mask, tokens.prefix), mask)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return joint.denoise(latents, torch.tensor([10.0, 800.0]), features, mask)


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("arm", ARMS)
def test_round_trip_is_bit_identical(make: Callable[..., Made], arm: str, lora: bool) -> None:
    folder, joint, encoder = make(arm, lora)
    expected = predict(joint, encoder)
    models = load_models(open_layout(folder), device="cpu")
    assert torch.equal(predict(models.joint, models.text_encoder), expected)
    assert models.text_encoder.settings == ARMS[arm] and models.step == 5 and models.multiple == 8
    assert not any(p.requires_grad for p in [*models.joint.parameters(), *models.text_encoder.parameters()])
    assert (folder / "text_encoder_lora").exists() == lora and (folder / "refiner").exists() == (arm == "modern")
    conditioning = models.encode(PROMPTS)
    assert conditioning.features.shape[:2] == (2, 32 if arm == "paper" else 8) and (conditioning.mask is None) == (
        arm == "paper"
    )


def test_diffusers_loads_the_unet_by_itself(make: Callable[..., Made]) -> None:
    from diffusers import UNet2DConditionModel

    folder, joint, _ = make("paper", False)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    own = joint.unet.state_dict()
    assert unet.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in unet.state_dict().items())


@torch.no_grad()
def test_peft_loads_the_adapter_by_itself(make: Callable[..., Made]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _, encoder = make("paper", True)
    base = AutoModel.from_pretrained(locate(TextEncoderConfig()), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "text_encoder_lora").eval()
    tokens = encoder.tokenize(PROMPTS)
    theirs = adapted(input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False).last_hidden_state
    assert torch.equal(theirs, encoder(tokens.ids, tokens.mask, 0))
    with adapted.disable_adapter():
        bare = adapted(input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False).last_hidden_state
    headed = AutoModelForCausalLM.from_pretrained(locate(TextEncoderConfig()), dtype=torch.float32)
    PeftModel.from_pretrained(headed, folder / "text_encoder_lora").eval()
    again = headed.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False).last_hidden_state
    assert torch.equal(again, theirs)
    assert not torch.allclose(theirs, bare, atol=1e-3), "the adapter does nothing"


# The fields of its LoraConfig; it takes no others.
KNOWN_TO_PEFT_0_7_1 = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "target_modules",
    "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
}  # fmt: skip


def test_files_written_twice_are_equal_and_say_one_thing(make: Callable[..., Made]) -> None:
    first, second = (make("modern", True, name)[0] for name in ("first", "second"))
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path
        if path.suffix == ".safetensors":
            with safe_open(first / path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    adapter = json.loads((first / "text_encoder_lora" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["o_proj", "q_proj", "v_proj"] and adapter["lora_alpha"] == 6
    assert adapter.keys() <= KNOWN_TO_PEFT_0_7_1
    assert PeftConfig.from_pretrained(str(first / "text_encoder_lora")).r == 2  # today's reads it, too
    description = open_layout(first).description
    assert description["lora"]["rank"] == 2 and description["coordinates"] == 2
    assert len(description["text_encoder"]["hash"]) == len(description["codec"]["hash"]) == 16
    assert description["conditioning"]["layer_tap"] == "mean" and description["conditioning"]["max_tokens"] == 32
    assert set(description["provenance"]["libraries"]) >= {"torch", "diffusers", "transformers", "peft"}
    assert load_file(first / "refiner" / "model.safetensors").keys() >= {"mean", "std"}


def test_another_frozen_model_is_refused_and_a_moved_one_found(
    make: Callable[..., Made], codec_folder: Path, tmp_path: Path
) -> None:
    folder, joint, encoder = make("paper", False)
    whole = (folder / "checkpoint.json").read_text()
    for part, key, value, said in (
        ("text_encoder", "hash", "0123456789abcdef", r"trained with 0123456789abcdef.*text_encoder\.path=<folder>"),
        ("codec", "hash", "0123456789abcdef", r"trained with 0123456789abcdef.*codec\.path=<folder>"),
        ("codec", "path", "/no/longer/here", "/no/longer/here"),
    ):
        description = json.loads(whole)
        description[part][key] = value
        (folder / "checkpoint.json").write_text(json.dumps(description))
        with pytest.raises(UserError, match=said):
            load_models(open_layout(folder), device="cpu")
    moved = shutil.copytree(codec_folder, tmp_path / "moved")
    # The same tensors in other files, and one file that nothing reads, are the same model.
    source, dealt = locate(TextEncoderConfig()), tmp_path / "dealt"
    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(dealt, max_shard_size="100KB")
    assert len(list(dealt.glob("*.safetensors"))) > 1
    for file in source.glob("token*"):
        shutil.copy(file, dealt)
    (moved / "unused.safetensors").write_bytes((moved / "diffusion_pytorch_model.safetensors").read_bytes())
    frozen = {"text_encoder": FrozenConfig(path=str(dealt)), "codec": FrozenConfig(path=str(moved))}
    description["codec"]["path"] = None
    (folder / "checkpoint.json").write_text(json.dumps(description))
    models = load_models(open_layout(folder), SampleConfig(**frozen), device="cpu")
    assert torch.equal(predict(models.joint, models.text_encoder), predict(joint, encoder))
    (folder / "checkpoint.json").write_text(json.dumps(description))
    models = load_models(open_layout(folder), SampleConfig(codec=FrozenConfig(path=str(moved))), device="cpu")
    assert torch.equal(predict(models.joint, models.text_encoder), predict(joint, encoder))


def test_a_git_lfs_pointer_is_named_wherever_weights_are_read(
    make: Callable[..., Made], codec_folder: Path, tmp_path: Path
) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    folder, _, _ = make("paper", True)
    for number, (source, name) in enumerate((
        (folder, "unet/diffusion_pytorch_model.safetensors"), (folder, "text_encoder_lora/adapter_model.safetensors"),
        (codec_folder, "diffusion_pytorch_model.safetensors"), (locate(TextEncoderConfig()), "model.safetensors"),
    )):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(source, copy)
        (copy / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{Path(name).name} is a Git LFS pointer.*git-lfs"):
            if source == codec_folder:
                load_codec(CodecConfig(path=str(copy)), "another hash")
            elif source == folder:
                open_layout(copy).weights()
            else:
                load_text_encoder(TextEncoderConfig(path=str(copy)), ConditioningConfig(), "another hash")
    write_manifest(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        find_checkpoint(folder)


def test_damaged_checkpoints_are_refused(make: Callable[..., Made]) -> None:
    folder, joint, _ = make("modern", True)
    for name in ("unet/diffusion_pytorch_model", "refiner/model", "text_encoder_lora/adapter_model"):
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{path.name} could not be read"):
            load_models(open_layout(folder), device="cpu")
        path.unlink()
        with pytest.raises(UserError, match=r"lacks .* of the model's tensors"):
            load_models(open_layout(folder), device="cpu")
        path.write_bytes(whole)
    load_models(open_layout(folder), device="cpu")
    wrong = {**dict(joint.trained()), "unet.conv_in.bias": torch.zeros(3)}
    save_weights(folder, joint, wrong, open_layout(folder).description)
    with pytest.raises(UserError, match=r"unet\.conv_in\.bias of shape \(3,\) does not fit"):
        load_models(open_layout(folder), device="cpu")
    with pytest.raises(UserError, match="device=gpu is unknown"):
        load_models(open_layout(folder), device="gpu")


def test_descriptions_that_are_refused(make: Callable[..., Made]) -> None:
    folder = make("paper", False)[0]
    path = folder / "checkpoint.json"
    good = json.loads(path.read_text())
    for text, words in (
        ("{", "could not be read"),
        (json.dumps({**good, "version": 99}), "paradiffusion 99"),
        (json.dumps({**good, "format": "other"}), "does not describe a checkpoint"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_models(open_layout(folder), device="cpu")
    unet = folder / "unet" / "config.json"
    config = unet.read_text()
    unet.write_text(json.dumps({**json.loads(config), "class_embed_type": "simple_projection"}))
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match=r"which this version no longer has; train it anew .*data/nano"):
        load_models(open_layout(folder), device="cpu")
    unet.write_text(config)
    good["conditioning"]["a_key_of_the_future"] = 1
    path.write_text(json.dumps(good))
    assert load_models(open_layout(folder), device="cpu").text_encoder.settings == replace(ARMS["paper"])


def test_a_checkpoint_from_before_a_key_is_one_with_its_default(make: Callable[..., Made], codec_folder: Path) -> None:
    folder = make("paper", False)[0]
    description = open_layout(folder).description
    for key in ("layout_patch", "layout_layers", "layout_reads"):
        del description["conditioning"][key]
    config = TrainConfig(
        conditioning=ARMS["paper"], unet=UNetConfig(arguments=TINY_UNET), codec=CodecConfig(path=str(codec_folder))
    )
    check_init(config, folder, description)
    with pytest.raises(UserError, match=r"conditioning\.layout_layers=2, and this command says 3"):
        check_init(replace(config, conditioning=replace(ARMS["paper"], layout_layers=3)), folder, description)
