"""Text encoders by override: each configuration file with a tiny random model of the same class."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import user_error
from safetensors.torch import load_file, save_file
from tiny_encoders import make_tokenizer, shrink, write_encoder
from torch import Tensor

from paradiffusion.compose import compose_train, options
from paradiffusion.config import ConditioningConfig, LoraConfig, TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.text.encoder import TextEncoder, attach_lora, load_text_encoder
from paradiffusion.text.families import empty_model, lacks, lacks_bitsandbytes, layers_of, multiply_in_fp8, text_width

NAMES = options("text_encoder")
# Millions of parameters without a head, and the width of the features; published, or counted from the weights' headers.
SIZES = {
    "clip_l": (123.06, 768),
    "gemma3_4b": (3880.3, 2560),
    "llama2_13b": (12852.0, 5120),
    "llama2_7b": (6607.3, 4096),
    "llama3_1_8b": (7504.9, 4096),
    "qwen3_4b": (4022.5, 2560),
    "smollm2_135m": (134.515, 576),
    "t5_xxl": (4762.3, 4096),
    "tiny": (0.1068, 64),
}
FAMILIES = ["llama2_7b", "qwen3_4b", "gemma3_4b", "t5_xxl", "clip_l"]  # one of each class
TARGETS = {"t5_xxl": ["q", "v"]}
Folder = Callable[[str], Path]


def of(name: str, *overrides: str) -> TextEncoderConfig:
    """What ``text_encoder=name`` says, whole and in fp32."""
    whole = [f"text_encoder={name}", "text_encoder.layers=null", "text_encoder.dtype=float32"]
    return compose_train([*whole, *overrides]).text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("encoders")

    def make(name: str) -> Path:
        target = root / name
        return target if target.is_dir() else write_encoder(target, of(name).architecture)

    return make


def load(name: str, path: Path, settings: ConditioningConfig | None = None, *overrides: str) -> TextEncoder:
    return load_text_encoder(of(name, f"text_encoder.path={path}", *overrides), settings or ConditioningConfig())


@torch.no_grad()
def encode(encoder: TextEncoder, captions: list[str]) -> Tensor:
    tokens = encoder.tokenize(captions)
    return encoder(tokens.ids, tokens.mask, tokens.prefix)


@pytest.mark.parametrize("name", NAMES)
def test_size_of_the_real_model(name: str) -> None:
    config = of(name)
    model = empty_model(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    millions, width = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert text_width(config) == width and config.name == name and (config.hub or name == "tiny")


def test_an_empty_model_is_cut_and_needs_an_architecture() -> None:
    whole, cut = empty_model(of("t5_xxl")), empty_model(of("t5_xxl", "text_encoder.layers=5"))
    layers = cut.get_submodule(layers_of(cut))
    assert len(layers) == 5 and cut.encoder.final_layer_norm is not None  # type: ignore[arg-type]
    each = sum(p.numel() for p in layers[1].parameters())  # type: ignore[index]
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in cut.parameters()) == 19 * each
    for architecture in ({}, {"model_type": "no_such"}, {"model_type": "llama", "hidden_size": "wide"}):
        with pytest.raises(UserError, match=r"text_encoder\.architecture of mine does not describe") as error:
            text_width(TextEncoderConfig(name="mine", architecture=architecture))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_reads_a_model_of_its_class(name: str, folder: Folder) -> None:
    encoder = load(name, folder(name), ConditioningConfig(mask_padding=True, max_tokens=64))
    assert type(encoder.model) is type(empty_model(of(name)))
    assert encoder.width == text_width(of(name, f"text_encoder.path={folder(name)}")) != text_width(of("llama2_13b"))
    features = encode(encoder, ["a red circle", ""])
    assert features.shape[::2] == (2, encoder.width) and features.shape[1] in (8, 16) and torch.isfinite(features).all()
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_of_a_sequence(name: str, folder: Folder) -> None:
    encoder = load(name, folder(name), ConditioningConfig(max_tokens=60))
    tokenizer = encoder.tokenizer
    start, end = {
        "t5_xxl": ([], [tokenizer.eos_token_id]),
        "clip_l": ([tokenizer.bos_token_id], [tokenizer.eos_token_id]),
        "qwen3_4b": ([tokenizer.eos_token_id], []),
    }.get(name, ([tokenizer.bos_token_id], []))
    words = tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    tokens = encoder.tokenize(["a red circle", "", "a red circle " * 60])
    pad = tokenizer.pad_token_id if name == "t5_xxl" else tokenizer.eos_token_id
    for row, expected in enumerate((start + words + end, start + end)):
        assert tokens.ids[row].tolist() == expected + [pad] * (60 - len(expected))
        assert tokens.mask[row].tolist() == [True] * len(expected) + [False] * (60 - len(expected))
        assert tokens.lengths[row] == len(expected)
    last = tokens.ids[2].tolist()
    assert tokens.truncated == 1 and tokens.mask[2].all() and last[: len(start)] == start
    assert last[60 - len(end) :] == end and tokens.lengths[2] > 60


@pytest.mark.parametrize("name", FAMILIES)
def test_the_name_of_a_special_token_is_text(name: str, folder: Folder) -> None:
    encoder = load(name, folder(name))
    names = [str(mark) for mark in encoder.tokenizer.all_special_tokens]
    assert names
    plain = encoder.tokenize(["a b"])
    special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}
    for mark in names:
        tokens = encoder.tokenize([f"a {mark} b"])
        ids = tokens.ids[0, tokens.mask[0]].tolist()
        assert sum(number in special for number in ids) == sum(number in special for number in plain.ids[0, plain.mask[0]].tolist()), mark


def test_clip_has_77_positions(folder: Folder) -> None:
    long, short = "a red circle at the left " * 9, "a red circle"
    for masked in (False, True):
        encoder = load("clip_l", folder("clip_l"), ConditioningConfig(mask_padding=masked, max_tokens=512))
        tokens = encoder.tokenize([long, short])
        assert tokens.ids.shape == (2, 77) and tokens.truncated == 1 and tokens.lengths[0] > 77
        assert encode(encoder, [long, short]).shape == (2, 77, 32)
        assert tokens.ids[0, -1] == encoder.tokenizer.eos_token_id
    prefixed = load("clip_l", folder("clip_l"), ConditioningConfig(prefix="draw this:", max_tokens=512))
    tokens = prefixed.tokenize([long, ""])
    assert tokens.ids.shape == (2, 77) and tokens.lengths[1] == 1 and tokens.prefix == 10
    assert encode(prefixed, [long, ""]).shape == (2, 67, 32)
    with pytest.raises(UserError, match="leave 0 tokens for a caption"):
        load("clip_l", folder("clip_l"), ConditioningConfig(prefix="describe the picture " * 5))
    for name in ("llama2_7b", "t5_xxl"):
        assert load(name, folder(name), ConditioningConfig(max_tokens=5000)).limit == 5000


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_taps(name: str, folder: Folder) -> None:
    """ "last" is what the model gives, its final norm applied; "mean" is the average over all layers, by hand."""
    last = load(name, folder(name), ConditioningConfig(max_tokens=40))
    mean = load(name, folder(name), ConditioningConfig(max_tokens=40, layer_tap="mean"))
    captions = ["a red circle", "two blue squares"]
    tokens = last.tokenize(captions)
    with torch.no_grad():
        out = last.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True)
    torch.testing.assert_close(encode(last, captions), out.last_hidden_state)
    layers = last.model.get_submodule(layers_of(last.model))
    assert len(out.hidden_states) == len(layers) + 1 == 4
    states = [*out.hidden_states[:3], out.last_hidden_state]
    by_hand = torch.stack([F.layer_norm(state, (32,)) for state in states]).mean(0)
    torch.testing.assert_close(encode(mean, captions), by_hand)

    cut = load(name, folder(name), ConditioningConfig(max_tokens=40), "text_encoder.layers=2")
    assert len(cut.model.get_submodule(layers_of(cut.model))) == 2
    norms = [m for n, m in cut.model.named_modules() if n.rpartition(".")[2] in ("norm", "final_layer_norm")]
    norm = norms[-1]
    with torch.no_grad():  # the model's own final norm closes the shorter model
        torch.testing.assert_close(encode(cut, captions), norm(out.hidden_states[2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_change_a_caption(name: str, folder: Folder) -> None:
    """Of every layer, the last among them."""
    encoder = load(name, folder(name), ConditioningConfig(mask_padding=True, max_tokens=256, layer_tap="mean"))
    length = encoder.tokenize(["a red circle"]).lengths[0]
    alone = encode(encoder, ["a red circle"])
    together = encode(encoder, ["two blue squares at the left " * 6, "a red circle"])
    assert together.shape[1] > alone.shape[1]
    torch.testing.assert_close(together[1, :length], alone[0, :length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name: str, folder: Folder) -> None:
    encoder = load(name, folder(name), ConditioningConfig(max_tokens=40))
    before = encode(encoder, ["a red circle"])
    with pytest.raises(UserError, match=r"lora\.target_modules=\['wrong'\]: wrong names no layer of this text encoder"):
        attach_lora(encoder, LoraConfig(target_modules=["wrong"]))
    attach_lora(encoder, LoraConfig(rank=2, target_modules=TARGETS.get(name, ["q_proj", "v_proj"])))
    assert torch.equal(encode(encoder, ["a red circle"]), before)
    encoder.train()
    tokens = encoder.tokenize(["a red circle", "two blue squares"])
    both = [encoder(tokens.ids, tokens.mask) for _ in range(2)]
    assert torch.equal(*both), "dropout is off in training as well (T5 is published with 0.1)"
    both[0].square()[..., 0].sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
    assert len(gradients) == 3 * 2 * 2  # layers, targets, factors
    assert all(g is not None and g.dtype == torch.float32 for g in gradients.values())
    assert all(g.abs().sum() > 0 for n, g in gradients.items() if "lora_B" in n and g is not None)


def test_a_multimodal_checkpoint_gives_its_language_model(folder: Folder, tmp_path: Path) -> None:
    """Under both of transformers' names for it; and a whole CLIP its text encoder."""
    from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = folder("gemma3_4b")
    text = json.loads((plain / "config.json").read_text())
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(AutoModel.from_pretrained(plain).state_dict())
    expected = encode(load("gemma3_4b", plain), ["a red circle"])
    model.save_pretrained(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    state = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    for names, prefix in (("old", "language_model.model.layers.0"), ("new", "model.language_model.layers.0")):
        target = tmp_path / names
        assert any(n.startswith(prefix) for n in load_file(target / "model.safetensors"))
        make_tokenizer("gemma3_text").save_pretrained(target)
        encoder = load("gemma3_4b", target)
        torch.testing.assert_close(encode(encoder, ["a red circle"]), expected)
        assert not any("vision" in n for n, _ in encoder.named_parameters())

    plain = folder("clip_l")
    text = json.loads((plain / "config.json").read_text())
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}))
    whole.text_model.load_state_dict(AutoModel.from_pretrained(plain).state_dict())
    whole.save_pretrained(tmp_path / "clip")
    make_tokenizer("clip_text_model").save_pretrained(tmp_path / "clip")
    assert AutoConfig.from_pretrained(tmp_path / "clip").model_type == "clip"
    encoder = load("clip_l", tmp_path / "clip")
    torch.testing.assert_close(encode(encoder, ["a red circle"]), encode(load("clip_l", plain), ["a red circle"]))
    assert encoder.limit == 77


def test_a_whole_t5_gives_its_encoder(folder: Folder, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    plain = folder("t5_xxl")
    arguments = shrink(of("t5_xxl").architecture, len(make_tokenizer("t5")))
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(arguments.pop("model_type"), **arguments))
    weights = {n: t for n, t in load_file(plain / "model.safetensors").items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    model.save_pretrained(tmp_path / "whole")
    make_tokenizer("t5").save_pretrained(tmp_path / "whole")
    encoder = load("t5_xxl", tmp_path / "whole")
    torch.testing.assert_close(encode(encoder, ["a red circle"]), encode(load("t5_xxl", plain), ["a red circle"]))
    assert not any("decoder" in n for n, _ in encoder.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_lacks_a_tensor_is_refused(name: str, folder: Folder, tmp_path: Path) -> None:
    target = tmp_path / "lacking"
    shutil.copytree(folder(name), target)
    state = load_file(target / "model.safetensors")
    gone = next(n for n in sorted(state) if "1" in n and n.endswith("weight"))
    save_file({n: t for n, t in state.items() if n != gone}, target / "model.safetensors", metadata={"format": "pt"})
    user_error(f"lacks 1 of the tensors .* {gone.removeprefix('text_model.')} the first", load, name, target)


def test_old_bin_files_are_read_and_nothing_in_them_is_run(folder: Folder, tmp_path: Path) -> None:
    plain, target = folder("llama2_7b"), tmp_path / "old"
    shutil.copytree(plain, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    encoder = load("llama2_7b", target)
    assert torch.equal(encode(encoder, ["a red circle"]), encode(load("llama2_7b", plain), ["a red circle"]))
    assert encoder.source["hash"] != load("llama2_7b", plain).source["hash"] != ""
    ran = tmp_path / "ran"
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(ran)))
    user_error("could not be read", load, "llama2_7b", target)
    assert not ran.exists()


class Touch:
    """Unpickled without care, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(("kind", "package"), [("4bit", "bitsandbytes"), ("fp8", "torchao")])
def test_few_bits_need_a_gpu(kind: str, package: str, folder: Folder) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=f"needs a CUDA device and the package {package}, and there is no CUDA device"):
        load("llama2_7b", folder("llama2_7b"), None, f"text_encoder.quantization={kind}")


@pytest.mark.parametrize(("capability", "said"), [((8, 0), "no products of 8 bits"), ((9, 0), "torchao is not installed")])
def test_what_lacks_for_eight_bits(capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said in str(lacks("fp8")) and lacks(None) is None


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="the package torchao is not installed")
def test_products_of_eight_bits_reach_the_adapter(folder: Folder) -> None:
    """Rounded as on a GPU, multiplied in fp32."""
    found = []
    for eight_bits in (False, True):
        encoder = load("llama2_7b", folder("llama2_7b"))
        if eight_bits:
            multiply_in_fp8(encoder.model, emulate=True)
        attach_lora(encoder, LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]))
        tokens = encoder.tokenize(["a red circle", "a blue star"])
        features = encoder(tokens.ids, tokens.mask, tokens.prefix)
        features.square().mean().backward()
        gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        assert len(gradients) == 2 * 2 * 3, "of the adapter alone, in each of three layers"
        found.append((features.detach().flatten(), torch.cat(gradients)))
    for whole, rounded in zip(*found, strict=True):
        assert not torch.equal(whole, rounded) and torch.cosine_similarity(whole, rounded, dim=0) > 0.98


def test_an_old_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for taken, said in ((False, "too old"), (True, None)):
        monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda taken=taken: taken)
        assert (said or "None") in str(lacks_bitsandbytes())
