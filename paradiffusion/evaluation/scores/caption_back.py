"""The caption-back score: a vision-language model describes the picture, and its words are compared with the prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult
from paradiffusion.evaluation.scores.image_features import FeatureStore
from paradiffusion.evaluation.scores.vlm_answers import Asker
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt, by_id
from paradiffusion.metrics.text_embedding import TextEmbedder, embedding_settings
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
    Qwen3-Embedding-8B. Here as many are asked for as the prompt has, since a caption of another length than the prompt's is less like
    it whatever it says. The second measure asks whether a prompt is nearer to its own picture's caption than to those of all other
    prompts' pictures; by chance one in as many as there are prompts is. ``embedding`` is a hub id or a folder."""

    name = "caption_back"

    def __init__(self, options: VlmOptions, embedding: str, device: str | None = None) -> None:
        self.asker, self.embedding, self.device = Asker(options, TOKENS), embedding, device
        self.title = f"Caption-back, {options.name} and {Path(embedding).name}"
        embedding_settings(embedding)  # what cannot be meant is told before anything is drawn

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.asker.settings(), "instruction": _INSTRUCTION, "words": "as the prompt",
            "text_embedding": embedding_settings(self.embedding),
        }  # fmt: skip

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        prompts = by_id(suite.prompts)
        asks = [(image, self.instruction(prompts[image.prompt])) for image in images]
        self.asker.ask(asks, work, run, self.name)
        heard = self.asker.heard(work)
        texts = {prompts[image.prompt].text: None for image in images}  # a dictionary, for its order
        texts |= {reply.text.strip(): None for ask in asks if (reply := heard.reply(*ask)).text.strip()}
        self._embed([text for text in texts if text], work, run)

    def instruction(self, prompt: SuitePrompt) -> str:
        """What the model is told about a picture of ``prompt``."""
        low, high = _WORDS
        return _INSTRUCTION.replace("{words}", str(min(high, max(low, round(prompt.words, -1)))))

    def _embed(self, texts: list[str], work: Path, run: Run) -> None:
        """Keep the vectors of those ``texts`` that have none yet."""
        store = FeatureStore(work, run.rank)
        missing = [text for text in texts if _key(text) not in store]
        if not missing:
            return
        embedder = TextEmbedder(self.embedding, self.device)
        with run.bar(len(missing), "text embeddings") as bar:

            def between(done: int) -> None:
                bar.update(done)
                run.check()

            for start in range(0, len(missing), _CHUNK):  # kept in pieces, for a stop to cost little
                part = missing[start : start + _CHUNK]
                vectors, cut = embedder.embed(part, between)
                notes = [{"cut": is_cut, "max_length": embedder.max_length} for is_cut in cut]
                store.add(dict(zip(map(_key, part), notes, strict=True)), vectors)
                store.flush()

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        prompts, heard, store = by_id(suite.prompts), self.asker.heard(work), FeatureStore(work)
        scores: list[ImageScore] = []
        described: list[ImageScore] = []
        unfinished = 0
        for image in images:
            reply = heard.reply(image, self.instruction(prompts[image.prompt]))
            scores.append(ImageScore(image.name, image.prompt, {one.name: 0.0 for one in _MEASURES}, error=reply.error))
            if not reply.error:
                unfinished += not reply.finished
                scores[-1].detail["caption"] = reply.text
                described.append(scores[-1])
        asked, said = [prompts[one.prompt].text for one in described], [one.detail["caption"] for one in described]
        if described:
            _compare(described, asked, *(torch.from_numpy(store.features([*map(_key, texts)])) for texts in (asked, said)))
        measures = list(_MEASURES)
        if described and not any("caption_back_retrieval" in score.values for score in described):
            measures = measures[:1]  # failed images alone say nothing of retrieval
            for score in scores:
                score.values.pop("caption_back_retrieval", None)
        notes = [store.notes[_key(text)] for text in (*(prompts[one.prompt].text for one in scores), *said) if text]
        share, length = sum(note["cut"] for note in notes) / max(1, len(notes)), notes[0]["max_length"] if notes else 0
        return ScoreResult(
            self.name, self.title,
            formula="Cosine between the text embeddings of the prompt and of a description of the picture. Retrieval: share of "
            "images whose prompt is nearer to their description than to those of all other prompts' pictures. Failed images "
            "count as 0 in both.",
            source="after TIT-Score (arXiv 2510.02987), with our own instruction",
            settings={**self.settings(), "answered_by": heard.engine, "embedder_reads_tokens": length, "texts_cut": share},
            measures=measures, images=scores,
            warnings=_remarks(scores, share, unfinished, length, alone=len(measures) < len(_MEASURES)),
        )  # fmt: skip


def _compare(scores: Sequence[ImageScore], texts: Sequence[str], asked: torch.Tensor, said: torch.Tensor) -> None:
    """Fill in both measures of images, from the vectors [N, D] of their prompts' ``texts`` and of their descriptions."""
    own = (asked * said).sum(1)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    group = torch.tensor([numbers[text] for text in texts])  # equal prompts are no rivals
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


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]
