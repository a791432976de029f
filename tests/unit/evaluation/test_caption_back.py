"""The caption-back score and its text-embedding models, with tiny models on disk and a server that says what it is told to."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Asked, ChatServer
from commands import user_error
from judged_scenes import Alone
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BartConfig, BartModel
from vlm_scoring import options_for

from paradiffusion.evaluation.records import Drawn, ScoreResult
from paradiffusion.evaluation.scores.caption_back import CaptionBack
from paradiffusion.evaluation.scores.image_features import FeatureStore
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.text_embedding import TextEmbedder

TEXTS = (
    "a red barn under a wide sky", "two green boats on still water", "an old clock over the door of a shop",
    "seven white birds above a field of snow", "a lamp on a small desk beside an open book",
)  # fmt: skip
WORDS = [word for text in TEXTS for word in text.split()]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedder") / "tiny-bert", WORDS)


@pytest.fixture
def suite() -> Suite:
    return Suite("five", "Five", tuple(SuitePrompt(f"p{number}", text) for number, text in enumerate(TEXTS)))


@pytest.fixture
def images(suite: Suite, tmp_path: Path) -> list[Drawn]:
    """One grey picture for each prompt, by whose lightness the server knows it."""
    made = []
    for number, prompt in enumerate(suite.prompts):
        Image.new("L", (24, 24), 40 * number).convert("RGB").save(tmp_path / f"{prompt.id}.png")
        made.append(Drawn(prompt.id, prompt.id, tmp_path / f"{prompt.id}.png"))
    return made


def which(asked: Asked) -> int:
    with Image.open(io.BytesIO(asked.image)) as image:
        return round(float(np.asarray(image.convert("L")).mean()) / 40)


def run(score: CaptionBack, suite: Suite, images: list[Drawn], folder: Path) -> ScoreResult:
    work = folder / "scores" / score.name
    score.prepare(suite, images, work, Alone())
    return score.result(suite, images, work)


def values(result: ScoreResult, measure: str) -> list[float]:
    return [score.values[measure] for score in result.images]


def test_a_caption_that_is_the_prompt_has_cosine_1_and_finds_it(
    score: Score, server: ChatServer, suite: Suite, images: list[Drawn], tmp_path: Path
) -> None:
    server.answer = lambda asked: (f"  {TEXTS[which(asked)]}\n", "stop")
    result = run(score(), suite, images, tmp_path)
    assert values(result, "caption_back") == pytest.approx([1.0] * 5, abs=1e-5)
    assert values(result, "caption_back_retrieval") == [1.0] * 5 and not result.warnings
    assert [one.detail["caption"] for one in result.images] == list(TEXTS)
    assert result.settings["embedder_reads_tokens"] == 64 and result.settings["texts_cut"] == 0
    assert result.title == "Caption-back, tiny-vlm and tiny-bert"

    server.answer = lambda asked: (TEXTS[(which(asked) + 1) % 5], "stop")  # each describes the next one's picture
    wrong = run(score(), suite, images, tmp_path / "wrong")
    assert max(values(wrong, "caption_back")) < 0.99 and values(wrong, "caption_back_retrieval") == [0.0] * 5
    server.answer = lambda asked: ("a thing", "stop")  # the same words for all find nothing
    assert values(run(score(), suite, images, tmp_path / "same"), "caption_back_retrieval") == [0.0] * 5


def test_retrieval_is_among_other_prompts(score: Score, suite: Suite, images: list[Drawn], tmp_path: Path) -> None:
    """Equal prompts and further images are no rivals, and of one prompt there is none."""
    six = Suite("six", "Six", (*suite.prompts, SuitePrompt("again", TEXTS[0])))
    more = [Drawn("p1_1", "p1", images[1].file), Drawn("again", "again", images[0].file)]
    assert values(run(score(), six, [*images, *more], tmp_path), "caption_back_retrieval") == [1.0] * 7
    alone = Suite("one", "One", suite.prompts[:1])
    result = run(score(), alone, [images[0], Drawn("p0_1", "p0", tmp_path / "none.png")], tmp_path / "alone")
    assert [one.values.keys() for one in result.images] == [{"caption_back"}] * 2
    assert [one.name for one in result.measures] == ["caption_back"] and "not computed" in result.warnings[0]


def test_as_many_words_are_asked_for_as_the_prompt_has(score: Score, server: ChatServer, images: list[Drawn], tmp_path: Path) -> None:
    server.answer = lambda asked: ("a barn", "length")
    texts = {"p0": "word " * 134, "p1": "one two", "p2": "x " * 999}
    long = Suite("s", "S", tuple(SuitePrompt(name, text) for name, text in texts.items()))
    result = run(score(), long, images[:3], tmp_path)
    assert sorted(asked.prompt.partition("about ")[2].split()[0] for asked in server.asked) == ["130", "20", "400"]
    assert all(asked.body["max_tokens"] == 768 and asked.body["temperature"] == 0 for asked in server.asked)
    assert "3 of 3 descriptions were cut at the model's longest answer" in result.warnings[0]
    assert "33.3% of the texts are longer than the 64 tokens" in result.warnings[1]
    assert result.settings["texts_cut"] == pytest.approx(1 / 3)


def test_failures_count_as_0_and_are_listed(score: Score, server: ChatServer, suite: Suite, images: list[Drawn], tmp_path: Path) -> None:
    server.answer = lambda asked: ("" if which(asked) == 2 else TEXTS[which(asked)], "stop")
    images[0].file.unlink()
    images[1].file.write_bytes(b"GIF89a")
    result = run(score(), suite, images, tmp_path)
    errors = [one.error for one in result.images]
    assert "cannot be read" in errors[0] and "does not decode" in errors[1]
    assert errors[2:] == ["the model wrote nothing about it", "", ""]
    assert values(result, "caption_back")[:3] == values(result, "caption_back_retrieval")[:3] == [0, 0, 0]
    assert values(result, "caption_back_retrieval")[3:] == [1, 1] and "3 of 5 images failed" in result.warnings[0]
    assert values(run(score(), suite, images[:2], tmp_path / "nothing"), "caption_back") == [0, 0]


def test_nothing_is_asked_or_embedded_twice(
    score: Score, server: ChatServer, suite: Suite, images: list[Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, work = score(), tmp_path / "s" / "caption_back"
    with pytest.raises(KeyboardInterrupt):
        made.prepare(suite, images[:3], work, Alone(0, 2, stop_after=3))
    made.prepare(suite, images[3:], work, Alone(1, 2))
    made.prepare(suite, images[:3], work, Alone(0, 2))
    assert len(server.asked) == 5 and len(list(work.glob("features.*.safetensors"))) == 2
    embedded: list[str] = []
    embed = TextEmbedder.embed

    def noted(self: TextEmbedder, texts: list[str], *more: Any) -> Any:
        embedded.extend(texts)
        return embed(self, texts, *more)

    monkeypatch.setattr(TextEmbedder, "embed", noted)
    made.prepare(suite, images, work, Alone())
    assert len(server.asked) == 5 and not embedded
    assert values(made.result(suite, images, work), "caption_back_retrieval") == [1.0] * 5
    broken = next(work.glob("features.*.rank1-*"))
    broken.write_bytes(broken.read_bytes()[:40])
    made.prepare(suite, images, work, Alone())
    assert sorted(embedded) == sorted(TEXTS[3:]) and len(FeatureStore(work).notes) == len(TEXTS)


def embedder(folder: Path | str) -> TextEmbedder:
    return TextEmbedder(str(folder), "cpu")


def states(folder: Path, text: str) -> torch.Tensor:
    """Token features [L, D] of one text by itself, from transformers."""

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        features: torch.Tensor = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    return features


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, lambda s: s.mean(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda s: s[0]),
        ({"pooling_mode_max_tokens": True}, lambda s: s.max(0).values),
        ({"pooling_mode": "lasttoken"}, lambda s: s[-1]),
        ({"pooling_mode": "weightedmean"}, lambda s: (s * torch.arange(1, len(s) + 1)[:, None]).sum(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, lambda s: torch.cat([s[0], s.mean(0)])),
    ],
)
def test_poolings_are_those_of_the_files(
    pooling: dict[str, object], expected: Callable[..., torch.Tensor], bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    (folder / "modules.json").write_text(json.dumps(modules("", "Normalize")))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **pooling}))
    vectors, cut = embedder(folder).embed(TEXTS)
    right = torch.stack([unit(expected(states(folder, text))) for text in TEXTS])
    assert torch.allclose(vectors, right, atol=1e-5) and cut == [False] * 5  # whatever they are padded to


def test_a_decoder_gives_its_last_token(tmp_path: Path) -> None:
    folder = write_embedder(tmp_path / "decoder", WORDS, decoder=True)
    right = torch.stack([unit(states(folder, text)[-1]) for text in TEXTS])
    assert torch.allclose(embedder(folder).embed(TEXTS)[0], right, atol=1e-5)


def test_limits_prefixes_and_folders_of_sentence_transformers(tmp_path: Path) -> None:
    folder = write_embedder(
        tmp_path / "model", WORDS, modules=modules("0_Transformer"), pooling={"pooling_mode_mean_tokens": True},
        sentence_bert_config={"max_seq_length": 10, "do_lower_case": True},
    )  # fmt: skip
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"doc": "a field "}, "default_prompt_name": "doc"}))
    own = embedder(folder)
    assert own.max_length == 10 and own.prefix == "a field "
    vectors, cut = own.embed([TEXTS[0].upper(), TEXTS[3]])  # with the prefix and two marks, 11 and 12 tokens
    assert cut == [True, True] and own.embed([])[1] == []
    (folder / "config_sentence_transformers.json").unlink()
    plain = embedder(folder)
    assert plain.embed([TEXTS[0]])[1] == [False]
    assert torch.allclose(plain.embed(["a field " + TEXTS[0]])[0], vectors[:1], atol=1e-5)


def test_wrong_models_are_refused_in_a_sentence(bert: Path, tmp_path: Path) -> None:
    def refuse(message: str, model: Any) -> None:
        user_error(message, embedder, model)

    refuse("text_embedding=nothing is neither a folder nor a hub id", "nothing")
    refuse("text_embedding=no/such-model cannot be loaded .*hf download", "no/such-model")
    (tmp_path / "empty").mkdir()
    refuse("cannot be loaded .*config.json", tmp_path / "empty")
    named = [*modules(), {"idx": 2, "name": "2", "path": "", "type": "code.Layer"}]
    own = write_embedder(tmp_path / "own", WORDS, modules=named, pooling={"pooling_mode": "mean"})
    (own / "code.py").write_text("raise SystemExit('ran')")
    refuse("cannot be loaded .*code.Layer", own)
    median = write_embedder(tmp_path / "median", WORDS, modules=modules(), pooling={"pooling_mode": "median"})
    refuse("cannot be loaded .*median", median)
    shape: dict[str, int] = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    BartModel(BartConfig(vocab_size=8, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **shape)).save_pretrained(tmp_path / "bart")
    for file in bert.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bart")
    refuse("one with a decoder", tmp_path / "bart")
    pickled, foreign = (shutil.copytree(bert, tmp_path / name) for name in ("pickled", "foreign"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refuse("cannot be loaded", pickled)
    config = json.loads((bert / "config.json").read_text())
    (foreign / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}})
    )
    (foreign / "code.py").write_text("raise SystemExit('ran')")
    refuse("cannot be loaded", foreign)


Score = Callable[..., CaptionBack]


@pytest.fixture
def score(server: ChatServer, bert: Path) -> Score:
    """``score()``: with the server, which describes each picture by its prompt, and the tiny BERT."""
    server.answer = lambda asked: (TEXTS[which(asked)], "stop")
    return lambda: CaptionBack(options_for(server), str(bert))


WIDTH = 32


def write_embedder(
    folder: Path, words: list[str], decoder: bool = False, positions: int = 64, modules: list[dict[str, Any]] | None = None,
    pooling: dict[str, Any] | None = None, **files: Any,
) -> Path:  # fmt: skip
    """A BERT that knows ``words``, or a Llama with its language head's name; with modules.json where there are modules.

    ``files`` are further JSON files by their stem.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word.lower() for word in words})]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]" if decoder else "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        eos_token="[SEP]", padding_side="left",
    )  # fmt: skip
    shape: dict[str, Any] = {
        "vocab_size": len(pieces), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": positions, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = LlamaForCausalLM(LlamaConfig(**shape)) if decoder else BertModel(BertConfig(**shape))
        for name, parameter in network.named_parameters():
            if "embed" in name and parameter.ndim > 1:  # words must differ
                parameter.data = torch.randn_like(parameter) * (1.0 if "word" in name or "tokens" in name else 0.02)
    inner = folder / next((str(m["path"]) for m in modules or [] if str(m["type"]).endswith("Transformer")), "")
    inner.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(inner)
    wrapped.save_pretrained(inner)
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **(pooling or {})}))
    for name, content in files.items():
        (inner / f"{name}.json").write_text(json.dumps(content))
    return folder


def modules(inner: str = "", *more: str) -> list[dict[str, Any]]:
    """The modules.json of sentence-transformers: a transformer in ``inner``, a pooling, and ``more``."""
    names = [("Transformer", inner), ("Pooling", "1_Pooling"), *((kind, f"2_{kind}") for kind in more)]
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(names)
    ]
