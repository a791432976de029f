"""Registry of scores: those that can be computed from what was given, and what the others lack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.records import Painter, Score, ScoreResult
from paradiffusion.evaluation.suites.suite import Suite

COUNTERFACTUAL = 20  # prompts, each drawn again without each of its sentences; our choice

_CLIP = "clip= is not given; name an open_clip model, such as clip=ViT-L-14-quickgelu:openai"
_VLM = (
    "no vision-language model is given; name one with vlm=qwen3_vl_8b (or a folder), or a server with "
    "endpoint=http://localhost:8000/v1"
)
_REFERENCE = "reference= is not given; name a folder of real pictures, or a .npz of their statistics"
_INCEPTION = (
    "inception= is not given; name the FID's Inception weights (`python scripts/evaluate.py --help` says which)"
)
_EMBEDDING = (
    "text_embedding= is not given; name a text-embedding model, such as text_embedding=Qwen/Qwen3-Embedding-0.6B"
)


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
        kind: of that model, as ``result.KINDS``.
    """
    scenes = any("scene" in prompt.meta for prompt in suite.prompts)
    only_scenes = "" if scenes else "it is for suite=scenes, whose ground truth is known"
    questions = any(prompt.questions for prompt in suite.prompts)
    asks = "" if questions else f"the suite {suite.name} has no questions"
    clip, vlm = "" if options.clip else _CLIP, "" if options.vlm or options.endpoint else _VLM
    reference = "" if options.reference else _REFERENCE
    inception = "" if options.inception else _INCEPTION
    # Where the truth is known no model need guess it.
    sentences = "" if scenes else clip
    judges = _Judges(options, scenes, device)
    dpg = "" if "dpg" in suite.measures else "it is for suite=dpg, to whose questions it belongs"
    drawing = (
        "" if painter is not None else "it draws further pictures, and a folder of pictures cannot; it needs a model"
    )
    prompts = options.counterfactual if options.counterfactual is not None else COUNTERFACTUAL
    unasked = "" if options.counterfactual is not None or (scenes and kind == "checkpoint") else (
        f"counterfactual= is not given; counterfactual={COUNTERFACTUAL} draws so many prompts again without each of their sentences"
    )  # fmt: skip
    return [
        Offer("scenes", "Scenes", _scenes, only_scenes, scenes),
        Offer("sentences", "Sentence report", lambda: _sentences(judges), sentences),
        Offer(
            "counterfactual", "Counterfactual: the same picture without one sentence",
            lambda: _counterfactual(judges, painter, prompts), drawing or unasked,
            usual=options.counterfactual != 0 and painter is not None,
        ),
        Offer("segments", "Segment alignment", lambda: _segments(judges), sentences),
        Offer("checklist", "Checklist", lambda: _checklist(options, device), asks or vlm, questions),
        Offer("dpg", "DPG as published", lambda: _dpg(options, device, True), dpg or vlm, not dpg),
        Offer("dpg_corrected", "DPG, corrected", lambda: _dpg(options, device, False), dpg or vlm, not dpg),
        Offer(
            "caption_back", "Caption-back", lambda: _caption_back(options, device),
            vlm or ("" if options.text_embedding else _EMBEDDING),
        ),
        Offer("fid", "FID", lambda: _distance("FrechetInception", options, device), reference or inception),
        Offer("kid", "KID", lambda: _distance("KernelInception", options, device), reference or inception
              or _statistics(options), ),
        Offer("clip_fd", "CLIP-FD", lambda: _distance("FrechetClip", options, device), reference or clip),
    ]  # fmt: skip


def make_scores(options: EvaluateOptions, found: list[Offer]) -> list[Score | ScoreResult]:
    """The scores that ``scores=`` asks for, and a skipped result for each that cannot be computed.

    Raises:
        UserError: for a name that there is not, and where a score cannot take what it was given.
    """
    if options.clip:
        from paradiffusion.metrics.clip import parse_spec

        parse_spec(options.clip)  # what names no model is answered before anything is drawn
    wanted = options.wanted_scores()
    known = [offer.name for offer in found]
    for name in wanted or ():
        if name not in known:
            raise UserError(
                f"scores={options.scores}: {name} is unknown; choose among {', '.join(known)}, or scores=auto."
            )
    chosen = [offer for offer in found if (offer.usual if wanted is None else offer.name in wanted)]
    return [
        ScoreResult(offer.name, offer.title, skipped=f"{offer.missing}.") if offer.missing else offer.make()
        for offer in chosen
    ]


def check_possible(options: EvaluateOptions, chosen: list[list[Score | ScoreResult]]) -> None:
    """Raise UserError where a score that was asked for by name can be computed for none of what is judged."""
    for name in options.wanted_scores() or ():
        rows = [score for scores in chosen for score in scores if score.name == name]
        if rows and all(isinstance(score, ScoreResult) for score in rows):
            reason = next(score.skipped for score in rows if isinstance(score, ScoreResult))
            raise UserError(f"scores={options.scores}: {name} cannot be computed: {reason}")


def _statistics(options: EvaluateOptions) -> str:
    is_file = options.reference is not None and Path(options.reference).expanduser().is_file()
    return "reference= is a file of statistics; KID needs the folder of the pictures" if is_file else ""


def _scenes() -> Score:
    from paradiffusion.evaluation.scores.scenes_score import ScenesScore

    return ScenesScore()


class _Judges:
    """The judge of sentences of one suite, one for all scores, so that its model is loaded once."""

    def __init__(self, options: EvaluateOptions, scenes: bool, device: str) -> None:
        self.options, self.scenes, self.device = options, scenes, device

    @cached_property
    def clip(self) -> Any:
        from paradiffusion.evaluation.scores.sentence_judges import ClipJudge

        return ClipJudge(str(self.options.clip), self.device, self.options.clip_precision)

    @cached_property
    def best(self) -> Any:
        """The truth on scenes, CLIP elsewhere."""
        from paradiffusion.evaluation.scores.sentence_judges import SceneJudge

        return SceneJudge() if self.scenes else self.clip


def _sentences(judges: _Judges) -> Score:
    from paradiffusion.evaluation.scores.sentence_report import SentenceReport

    return SentenceReport(judges.best)


def _counterfactual(judges: _Judges, painter: Painter | None, prompts: int) -> Score:
    from paradiffusion.evaluation.scores.counterfactual import Counterfactual
    from paradiffusion.evaluation.scores.sentence_judges import NoJudge

    assert painter is not None
    judge = judges.best if judges.scenes or judges.options.clip else NoJudge()
    return Counterfactual(painter, judge, prompts, judges.clip if judges.options.clip else None)


def _segments(judges: _Judges) -> Score:
    from paradiffusion.evaluation.scores.segments import SegmentAlignment

    return SegmentAlignment(judges.clip if judges.options.clip else judges.best)


def _vlm(options: EvaluateOptions, device: str) -> Any:
    from paradiffusion.metrics.vlm import VlmOptions

    chosen = VlmOptions(
        engine="endpoint" if options.endpoint else "transformers",
        model=options.vlm or "",
        revision=options.vlm_revision,
        dtype=options.vlm_dtype,
        device=device,
        batch_size=options.vlm_batch_size,
        endpoint=options.endpoint,
        served=options.served,
        api_key_env=options.api_key_env,
        concurrency=options.concurrency,
        key="vlm",
    )
    chosen.check()
    return chosen


def _checklist(options: EvaluateOptions, device: str) -> Score:
    from paradiffusion.evaluation.scores.checklist import Checklist

    return Checklist(_vlm(options, device))


def _dpg(options: EvaluateOptions, device: str, published: bool) -> Score:
    from paradiffusion.evaluation.scores import dpg_bench as dpg

    return (dpg.DpgPublished if published else dpg.DpgCorrected)(_vlm(options, device))


def _caption_back(options: EvaluateOptions, device: str) -> Score:
    from paradiffusion.evaluation.scores.caption_back import CaptionBack
    from paradiffusion.metrics.text_embedding import EmbeddingOptions

    embedding = EmbeddingOptions(str(options.text_embedding), device=device)
    embedding.check()
    return CaptionBack(_vlm(options, device), embedding)


def _distance(kind: str, options: EvaluateOptions, device: str) -> Any:
    from paradiffusion.evaluation.scores import set_quality

    reference = Path(str(options.reference)).expanduser()
    kept = Path("runs/evaluation/references")  # once for all models that are compared
    if kind == "FrechetClip":
        spec, precision = str(options.clip), options.clip_precision
        return set_quality.FrechetClip(reference, device, cache=kept, spec=spec, precision=precision)
    made = set_quality.FrechetInception if kind == "FrechetInception" else set_quality.KernelInception
    return made(reference, device, cache=kept, weights=Path(str(options.inception)))
