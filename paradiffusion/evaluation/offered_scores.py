"""Registry of scores: those that can be computed from what was given, and what the others lack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.records import Painter, Score, ScoreResult
from paradiffusion.evaluation.scores.checklist import Checklist
from paradiffusion.evaluation.scores.counterfactual import Counterfactual
from paradiffusion.evaluation.scores.dpg_bench import DpgCorrected, DpgPublished
from paradiffusion.evaluation.scores.scenes_score import ScenesScore
from paradiffusion.evaluation.scores.segments import SegmentAlignment
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, NoJudge, SceneJudge, SentenceJudge
from paradiffusion.evaluation.scores.sentence_report import SentenceReport
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.metrics.clip import parse_spec
from paradiffusion.metrics.vlm import VlmOptions

COUNTERFACTUAL = 20  # prompts, each drawn again without each of its sentences; our choice

_CLIP = "clip= is not given; name an open_clip model, such as clip=ViT-L-14-quickgelu:openai"
_VLM = "no vision-language model is given; name one with vlm=qwen3_vl_8b (or a folder), or a server with endpoint=http://localhost:8000/v1"
_REFERENCE = "reference= is not given; name a folder of real pictures, or a .npz of their statistics"
_INCEPTION = "inception= is not given; name the FID's Inception weights (`python scripts/evaluate.py --help` says which)"
_EMBEDDING = "text_embedding= is not given; name a text-embedding model, such as text_embedding=Qwen/Qwen3-Embedding-0.6B"


@dataclass(frozen=True)
class Offer:
    """A score that there is.

    Attributes:
        missing: why it cannot be computed, in a sentence that says how it could; "" where it can.
        usual: whether ``scores=auto`` has it here, be it as skipped.
    """

    name: str
    title: str
    make: Callable[[], Score]
    missing: str = ""
    usual: bool = True


def offers(options: EvaluateOptions, suite: Suite, painter: Painter | None, device: str, kind: str) -> list[Offer]:
    """All scores, in the order of reports.

    Args:
        painter: of the model that is judged; None for a folder of pictures.
        kind: of that model, as ``records.KINDS``.
    """
    scenes = any("scene" in prompt.meta for prompt in suite.prompts)
    only_scenes = "" if scenes else "it is for suite=scenes, whose ground truth is known"
    questions = any(prompt.questions for prompt in suite.prompts)
    asks = "" if questions else f"the suite {suite.name} has no questions"
    clip, vlm = "" if options.clip else _CLIP, "" if options.vlm or options.endpoint else _VLM
    embedding = "" if options.text_embedding else _EMBEDDING
    real = ("" if options.reference else _REFERENCE) or ("" if options.inception else _INCEPTION)
    given = Path(options.reference or "").expanduser()
    moments = "reference= is a file of statistics; KID needs the folder of the pictures" if given.is_file() else ""
    # Where the truth is known no model need guess it.
    sentences = "" if scenes else clip
    dpg = "" if "dpg" in suite.measures else "it is for suite=dpg, to whose questions it belongs"
    drawing = "" if painter is not None else "it draws further pictures, and a folder of pictures cannot; it needs a model"
    prompts = options.counterfactual if options.counterfactual is not None else COUNTERFACTUAL
    unasked = "" if options.counterfactual is not None or (scenes and kind == "checkpoint") else (
        f"counterfactual= is not given; counterfactual={COUNTERFACTUAL} draws so many prompts again without each of their sentences"
    )  # fmt: skip

    @cache  # one for all scores, so that its model is loaded once
    def by_clip() -> ClipJudge | None:
        return ClipJudge(options.clip, device, options.clip_precision) if options.clip else None

    def judge() -> SentenceJudge:
        return SceneJudge() if scenes else by_clip() or NoJudge()

    def counterfactual() -> Score:
        assert painter is not None
        return Counterfactual(painter, judge(), prompts)

    @cache
    def answering() -> VlmOptions:
        engine = options.engine or ("endpoint" if options.endpoint else "transformers")
        return VlmOptions(
            engine=engine, model=options.vlm or "", revision=options.vlm_revision, dtype=options.vlm_dtype, device=device,
            batch_size=options.vlm_batch_size, endpoint=options.endpoint, served=options.served,
            api_key_env=options.api_key_env, concurrency=options.concurrency, key="vlm",
        )  # fmt: skip

    def caption_back() -> Score:
        from paradiffusion.evaluation.scores.caption_back import CaptionBack  # slow to import, as is set_quality

        return CaptionBack(answering(), str(options.text_embedding), device)

    def distance(name: str) -> Any:
        from paradiffusion.evaluation.scores import set_quality

        kept = Path("runs/evaluation/references")  # once for all models that are compared
        if name == "clip_fd":
            return set_quality.FrechetClip(given, device, kept, spec=str(options.clip), precision=options.clip_precision)
        made = set_quality.FrechetInception if name == "fid" else set_quality.KernelInception
        return made(given, device, kept, weights=Path(str(options.inception)))

    return [
        Offer("scenes", "Scenes", ScenesScore, only_scenes, scenes),
        Offer("sentences", "Sentence report", lambda: SentenceReport(judge()), sentences),
        Offer(
            "counterfactual", "Counterfactual: the same picture without one sentence", counterfactual, drawing or unasked,
            usual=options.counterfactual != 0 and painter is not None,
        ),
        Offer("segments", "Segment alignment", lambda: SegmentAlignment(by_clip() or judge()), sentences),
        Offer("checklist", "Checklist", lambda: Checklist(answering()), asks or vlm, questions),
        Offer("dpg", "DPG as published", lambda: DpgPublished(answering()), dpg or vlm, not dpg),
        Offer("dpg_corrected", "DPG, corrected", lambda: DpgCorrected(answering()), dpg or vlm, not dpg),
        Offer("caption_back", "Caption-back", caption_back, vlm or embedding),
        Offer("fid", "FID", partial(distance, "fid"), real),
        Offer("kid", "KID", partial(distance, "kid"), real or moments),
        Offer("clip_fd", "CLIP-FD", partial(distance, "clip_fd"), ("" if options.reference else _REFERENCE) or clip),
    ]  # fmt: skip


def make_scores(options: EvaluateOptions, found: list[Offer]) -> list[Score | ScoreResult]:
    """The scores that ``scores=`` asks for, and a skipped result for each that cannot be computed.

    Raises:
        UserError: for a name that there is not, and where a score cannot take what it was given.
    """
    if options.clip:
        parse_spec(options.clip)  # what names no model is answered before anything is drawn
    wanted = options.wanted_scores()
    known = [offer.name for offer in found]
    for name in wanted or ():
        if name not in known:
            raise UserError(f"scores={options.scores}: {name} is unknown; choose among {', '.join(known)}, or scores=auto.")
    chosen = [offer for offer in found if (offer.usual if wanted is None else offer.name in wanted)]
    return [ScoreResult(offer.name, offer.title, skipped=f"{offer.missing}.") if offer.missing else offer.make() for offer in chosen]


def check_possible(options: EvaluateOptions, chosen: list[list[Score | ScoreResult]]) -> None:
    """Raise UserError where a score that was asked for by name can be computed for none of what is judged."""
    for name in options.wanted_scores() or ():
        rows = [score for scores in chosen for score in scores if score.name == name]
        if rows and all(isinstance(score, ScoreResult) for score in rows):
            reason = next(score.skipped for score in rows if isinstance(score, ScoreResult))
            raise UserError(f"scores={options.scores}: {name} cannot be computed: {reason}")
