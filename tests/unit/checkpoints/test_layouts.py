"""Checkpoints as others see them: equal after a round trip in the layouts of diffusers, PEFT and the official code, or refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import user_error
from official_models import MODERN, latents, make_official, make_ours, reference, same
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_unet import TINY_UNET
from transformers import AutoModel

from paradiffusion.checkpoints.export import export_official, export_ours, export_pipeline, official_differs
from paradiffusion.checkpoints.layouts import describe, find_checkpoint, open_layout, save_weights
from paradiffusion.checkpoints.manifest import find_fault, write_manifest
from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    FrozenConfig,
    LoraConfig,
    ObjectiveConfig,
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
from scripts.export import main as export
from scripts.publish import main as publish

ARMS = {
    "paper": ConditioningConfig(max_tokens=32),
    "modern": ConditioningConfig(
        name="modern", layer_tap="mean", projection="refiner", refiner_width=16, refiner_layers=1, refiner_heads=2, refiner_kernel=3,
        layout_patch=2, key_positions=True, mask_padding=True, max_tokens=32
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
    assert models.count_truncated(["a red circle " * 30, "a"]) == 1
    conditioning = models.encode(PROMPTS)
    assert conditioning.features.shape[:2] == (2, 32 if arm == "paper" else 8) and (conditioning.mask is None) == (arm == "paper")


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


def test_another_frozen_model_is_refused_and_a_moved_one_found(make: Callable[..., Made], codec_folder: Path, tmp_path: Path) -> None:
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
        user_error(said, load_models, open_layout(folder), device="cpu")
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


def test_a_git_lfs_pointer_is_named_wherever_weights_are_read(make: Callable[..., Made], codec_folder: Path, tmp_path: Path) -> None:
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
    user_error("is a Git LFS pointer", find_checkpoint, folder)


def test_damaged_checkpoints_are_refused(make: Callable[..., Made]) -> None:
    folder, joint, _ = make("modern", True)
    for name in ("unet/diffusion_pytorch_model", "refiner/model", "text_encoder_lora/adapter_model"):
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        user_error(f"{path.name} could not be read", load_models, open_layout(folder), device="cpu")
        path.unlink()
        user_error(r"lacks .* of the model's tensors", load_models, open_layout(folder), device="cpu")
        path.write_bytes(whole)
    load_models(open_layout(folder), device="cpu")
    wrong = {**dict(joint.trained()), "unet.conv_in.bias": torch.zeros(3)}
    save_weights(folder, joint, wrong, open_layout(folder).description)
    user_error(r"unet\.conv_in\.bias of shape \(3,\) does not fit", load_models, open_layout(folder), device="cpu")
    user_error("device=gpu is unknown", load_models, open_layout(folder), device="gpu")


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
        user_error(words, load_models, open_layout(folder), device="cpu")
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
    config = TrainConfig(conditioning=ARMS["paper"], unet=UNetConfig(arguments=TINY_UNET), codec=CodecConfig(path=str(codec_folder)))
    check_init(config, folder, description)
    with pytest.raises(UserError, match=r"conditioning\.layout_layers=2, and this command says 3"):
        check_init(replace(config, conditioning=replace(ARMS["paper"], layout_layers=3)), folder, description)


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
    user_error("exists already", export_ours, open_layout(folder), tmp_path / "ours")


def test_ours_to_official_keeps_what_it_has_no_place_for(tmp_path: Path, codec_folder: Path) -> None:
    ours = make_ours(tmp_path / "ours", codec_folder, conditioning=ConditioningConfig(max_tokens=32))
    export_official(open_layout(ours), tmp_path / "weights", frozen="copy")
    assert same(open_layout(ours).weights(), open_layout(tmp_path / "weights").weights())
    drawn = latents(tmp_path / "weights")  # as the released code does, which ends at the schedule's lowest noise
    assert torch.equal(latents(ours, final_sigmas_type="sigma_min"), drawn) and not torch.equal(latents(ours), drawn)
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
        ({"conditioning": ConditioningConfig(key_positions=True)}, "place for positions on the text's keys, which"),
        ({"objective": ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)}, "zero terminal SNR"),
    ],
)
def test_what_the_official_layout_has_no_place_for(tmp_path: Path, codec_folder: Path, changes: dict[str, Any], words: str) -> None:
    ours = make_ours(tmp_path / "ours", codec_folder, **changes)
    user_error(words, export_official, open_layout(ours), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_lora_of_the_unet_is_stored_apart_and_merged_in_exports(tmp_path: Path, codec_folder: Path) -> None:
    """What PEFT and diffusers make of it is in tests/integration/test_adapters.py."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    folder = make_ours(tmp_path / "ours", codec_folder, unet=UNetConfig(lora_rank=2, lora_alpha=6, lora_target_modules=targets))
    about = {"rank": 2, "alpha": 6, "target_modules": targets, "kind": "lora"}
    assert open_layout(folder).description["unet_lora"] == about
    state = open_layout(folder).weights(merge=False)
    unet = load_models(open_layout(folder), device="cpu").joint.unet.state_dict()
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(unet)
    layer = next(name for name in state if name.endswith("to_q.base_layer.weight")).removesuffix(".base_layer.weight")
    down, up = (state[f"{layer}.lora_{half}.default.weight"] for half in "AB")
    merged = state[f"{layer}.base_layer.weight"] + 3.0 * up @ down
    torch.testing.assert_close(unet[f"{layer.removeprefix('unet.')}.weight"], merged, atol=1e-6, rtol=0)
    export_ours(open_layout(folder), tmp_path / "published", frozen="none")
    assert not (tmp_path / "published" / "unet_lora").exists()
    assert torch.equal(latents(folder), latents(tmp_path / "published", codec_folder))
    # As versions before wrote it, under other libraries' names too.
    stored = load_file(folder / "unet_lora" / "adapter_model.safetensors")
    old = {name.replace("base_model.model.", "unet."): tensor.clone() for name, tensor in stored.items()}
    save_file({**stored, **old}, folder / "unet_lora" / "adapter_model.safetensors")
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
    user_error("format_version 2, newer than 1", find_checkpoint, folder)
    path.write_text(json.dumps({**manifest, "format_version": "x"}))
    assert find_fault(folder) == "manifest.json is not readable"


def test_an_export_is_whole_or_not_there(tmp_path: Path, codec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and a place where nothing can be written."""
    weights = open_layout(make_ours(tmp_path / "ours", codec_folder))
    (tmp_path / "file").write_text("precious")
    user_error(r"could not be written \(Not a directory\)", export_ours, weights, tmp_path / "file" / "below")
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
    monkeypatch.setattr("peft.LoraConfig.save_pretrained", full)
    for write in (
        lambda folder: export_ours(weights, folder),
        lambda folder: export_official(weights, folder, frozen="link"),
        lambda folder: export_pipeline(weights, folder),
    ):
        user_error("No space left on device.*nothing is left of it", write, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours"]
    assert (tmp_path / "file").read_text() == "precious"


def test_the_command_line(tmp_path: Path, codec_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = f"ckpt={make_ours(tmp_path / 'ours', codec_folder)}"
    assert export([ours, "to=official", f"output={tmp_path / 'w'}", "frozen=none", "dtype=float16"]) == 0
    said = capsys.readouterr().out
    assert "in the layout official" in said
    assert said.count("the released code: ") == 3 and "16 bits" in said and "to the letter" in said
    longer = open_layout(tmp_path / "ours")
    longer.description["conditioning"] |= {"max_tokens": 512, "clean_text": False}
    assert official_differs(longer, "float32") == [
        "it reads 256 tokens of a prompt, and this checkpoint 512: set that number there",
        "it leaves the schedule's lowest noise in, as sample.py does from this folder but not from the checkpoint",
    ]
    longer.description["scheduler"] = {"final_sigmas_type": "sigma_min"}  # of official weights
    assert len(official_differs(longer, "float32")) == 1
    found = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert found == ["paradiffusion.json", "scheduler", "text_encoder_lora", "unet"]
    for arguments, words in (
        (["ckpt=x", "output=y"], "to= is missing"),
        (["to=onnx", ours, "output=x"], "official, pipeline, ours"),
        (["ckpt=x", "to=ours", "out=y"], "the keys are ckpt, to, output"),
        ([ours, "to=ours", f"output={tmp_path / 'z'}", "text_encoder.path=/nowhere"], "holds no config.json"),
    ):
        user_error(words, export, arguments)
