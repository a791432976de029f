"""The caption-back score: a vision-language model describes the picture, and its words are compared with the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paradiffusion.atomic import atomic_file
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult
from paradiffusion.evaluation.scores.vlm_answers import Ask, Asker
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt, by_id
from paradiffusion.metrics.text_embedding import EmbeddingOptions, TextEmbedder
from paradiffusion.metrics.vlm import VlmOptions

TOKENS: Final = 768
_WORDS: Final = (20, 400)  # what is asked for at least and at most: our choice
_INSTRUCTION: Final = (
    "Describe this picture in one paragraph of about {words} words. Say what is in it and how many of each, what every thing "
    "looks like, where it is and how it relates to the others, then the setting, the light and the style. Name only what can be "
    "seen, and begin with the description itself."
)
_CHUNK: Final = 1024  # rows of a matrix of similarities at a time
_MEASURES: Final = (
    Measure("caption_back", "Caption-back similarity", "cosine"),
    Measure("caption_back_retrieval", "Captions nearest to their own prompt", "share"),
)


class CaptionBack:
    """Cosine between the embeddings of a prompt and of what a model writes about its picture.

    The idea is TIT-Score's (arXiv 2510.02987), which asks for 250 to 350 words for every picture and embeds with
    Qwen3-Embedding-8B; ``words=300`` is nearest to that. Here as many are asked for as the prompt has (``words=None``), since a caption
    of another length than the prompt's is less like it whatever it says. The second measure asks whether a prompt is nearer to
    its own picture's caption than to those of all other prompts' pictures; by chance one in as many as there are prompts is."""

    name = "caption_back"

    def __init__(self, options: VlmOptions, embedding: EmbeddingOptions | str, words: int | None = None) -> None:
        self.asker, self.words = Asker(options, TOKENS), words
        self.embedding = EmbeddingOptions(embedding) if isinstance(embedding, str) else embedding
        self.title = f"Caption-back, {options.name} and {Path(self.embedding.model).name}"

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.asker.settings(), "instruction": _INSTRUCTION, "words": self.words or "as the prompt",
            "text_embedding": self.embedding.settings(),
        }  # fmt: skip

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        self.embedding.check()
        prompts = by_id(suite.prompts)
        asks = [Ask(image, self.instruction(prompts[image.prompt])) for image in images]
        self.asker.ask(asks, work, run, self.name)
        heard = self.asker.heard(work)
        texts = {prompts[image.prompt].text: None for image in images}  # a dictionary, for its order
        texts |= {reply.text.strip(): None for ask in asks if (reply := heard.reply(ask.image, ask.prompt)).text.strip()}
        self._embed([text for text in texts if text], work, run)

    def instruction(self, prompt: SuitePrompt) -> str:
        """What the model is told about a picture of ``prompt``."""
        low, high = _WORDS
        return _INSTRUCTION.replace("{words}", str(self.words or min(high, max(low, round(prompt.words, -1)))))

    def _embed(self, texts: list[str], work: Path, run: Run) -> None:
        """Keep the vectors of those ``texts`` that have none yet."""
        work.mkdir(parents=True, exist_ok=True)
        known = Vectors(work)
        missing = [text for text in texts if text not in known]
        if not missing:
            return
        options = self.embedding
        embedder = TextEmbedder(options)
        with run.bar(len(missing), "text embeddings") as bar:

            def between(done: int) -> None:
                bar.update(done)
                run.check()

            for start in range(0, len(missing), _CHUNK):  # kept in pieces, for a stop to cost little
                part = missing[start : start + _CHUNK]
                vectors, cut = embedder.embed(part, between)
                known.add(run.rank, part, vectors, cut, embedder.max_length)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        prompts, heard, vectors = by_id(suite.prompts), self.asker.heard(work), Vectors(work)
        scores: list[ImageScore] = []
        described: list[tuple[ImageScore, torch.Tensor, torch.Tensor]] = []
        unfinished = 0
        for image in images:
            prompt = prompts[image.prompt]
            reply = heard.reply(image, self.instruction(prompt))
            caption, error = reply.text, reply.error
            score = ImageScore(image.name, image.prompt, {one.name: 0.0 for one in _MEASURES}, error=error)
            scores.append(score)
            if not error:
                unfinished += not reply.finished
                score.detail["caption"] = caption
                described.append((score, vectors.of(prompt.text), vectors.of(caption)))
        if described:
            found, asked, said = zip(*described, strict=True)
            _compare(found, torch.stack(asked), torch.stack(said), lambda name: prompts[name].text)
        measures = list(_MEASURES)
        if described and not any("caption_back_retrieval" in score.values for score, _, _ in described):
            measures = measures[:1]  # failed images alone say nothing of retrieval
            for score in scores:
                score.values.pop("caption_back_retrieval", None)
        used = [text for score in scores for text in (prompts[score.prompt].text, score.detail.get("caption", "")) if text]
        share = sum(vectors.cut(text) for text in used) / max(1, len(used))
        return ScoreResult(
            self.name, self.title,
            formula="Cosine between the text embeddings of the prompt and of a description of the picture. Retrieval: share of "
            "images whose prompt is nearer to their description than to those of all other prompts' pictures. Failed images "
            "count as 0 in both.",
            source="after TIT-Score (arXiv 2510.02987), with our own instruction",
            settings={**self.settings(), "answered_by": heard.engine, "embedder_reads_tokens": vectors.max_length,
                      "texts_cut": share},
            measures=measures, images=scores,
            warnings=_remarks(scores, share, unfinished, vectors.max_length, alone=len(measures) < len(_MEASURES)),
        )  # fmt: skip


def _compare(scores: Sequence[ImageScore], asked: torch.Tensor, said: torch.Tensor, text_of: Callable[[str], str]) -> None:
    """Fill in both measures of images, from the vectors [N, D] of their prompts and of their descriptions."""
    own = (asked * said).sum(1)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(text_of(score.prompt) for score in scores))}
    group = torch.tensor([numbers[text_of(score.prompt)] for score in scores])  # equal prompts are no rivals
    for start in range(0, len(scores), _CHUNK):
        rows = slice(start, start + _CHUNK)
        similar = (asked[rows] @ said.T).masked_fill(group[rows, None] == group[None, :], -torch.inf)  # [b, N]
        # Above by more than rounding: equal descriptions of all pictures find nothing.
        nearest = own[rows] > similar.max(1).values + 1e-6
        for score, cosine, found in zip(scores[rows], own[rows].tolist(), nearest.tolist(), strict=True):
            score.values = {"caption_back": max(-1.0, min(1.0, cosine)), "caption_back_retrieval": float(found)}
    if len(set(group.tolist())) < 2:  # nothing to be told from
        for score in scores:
            del score.values["caption_back_retrieval"]


def _remarks(scores: Sequence[ImageScore], cut: float, unfinished: int, length: int, alone: bool) -> list[str]:
    said = []
    if alone:
        said.append("There is no description of another prompt's picture, so retrieval was not computed.")
    if failed := sum(bool(score.error) for score in scores):
        said.append(f"{failed} of {len(scores)} images failed; they count as 0 and are listed.")
    if unfinished:
        said.append(f"{unfinished} of {len(scores)} descriptions were cut at the model's longest answer.")
    if cut:
        said.append(f"{cut:.1%} of the texts are longer than the {length} tokens that the text-embedding model reads.")
    return said


class Vectors:
    """Text vectors kept in a folder, as safetensors: one file for each piece of work of each process."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.max_length = folder, 0
        self._found: dict[str, torch.Tensor] = {}
        self._cut: set[str] = set()
        for path in sorted(folder.glob("vectors.rank*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    note = json.loads((file.metadata() or {})["note"])
                    rows = file.get_tensor("vectors").float()
            except (SafetensorError, KeyError, ValueError, OSError):
                continue  # its texts are embedded again
            self._found.update(zip(note["keys"], rows, strict=True))
            self._cut.update(note["cut"])
            self.max_length = note["max_length"]

    def __contains__(self, text: str) -> bool:
        return _key(text) in self._found

    def of(self, text: str) -> torch.Tensor:
        """The vector [D] of ``text``. Raises KeyError where there is none."""
        return self._found[_key(text)]

    def cut(self, text: str) -> bool:
        """Whether the model read only the beginning of ``text``."""
        return _key(text) in self._cut

    def add(self, rank: int, texts: Sequence[str], vectors: torch.Tensor, cut: Sequence[bool], max_length: int) -> None:
        """Keep ``vectors`` [B, D] of ``texts``, written whole or not at all."""
        keys = [_key(text) for text in texts]
        self._found.update(zip(keys, vectors, strict=True))
        gone = [key for key, is_cut in zip(keys, cut, strict=True) if is_cut]
        self._cut.update(gone)
        self.max_length = max_length
        note = json.dumps({"keys": keys, "cut": gone, "max_length": max_length})
        target = self._folder / f"vectors.rank{rank}.{hashlib.sha256(''.join(keys).encode()).hexdigest()[:12]}.safetensors"
        with atomic_file(target) as partial:
            save_file({"vectors": vectors.contiguous()}, partial, metadata={"note": note})


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]
