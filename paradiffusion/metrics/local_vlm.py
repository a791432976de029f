"""A vision-language model in this process: of transformers' image-text-to-text classes, or by vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from paradiffusion.checkpoints.tensors import whole_files
from paradiffusion.errors import UserError, reason_of
from paradiffusion.machine import choose_device, settled_dtype
from paradiffusion.metrics.vlm import Answer, Decoding, Question


class LocalModel:
    """The engine ``transformers``; see Engine. UserError where the model cannot be had or is none of this kind.

    Args:
        source: a hub id or a folder in transformers' layout, with safetensors and a chat template.
        revision: of the hub's repository; for a folder, any name for its weights.
        dtype, device: as VlmOptions has them.
    """

    def __init__(self, source: str, revision: str | None, dtype: str, device: str | None, batch_size: int, decoding: Decoding) -> None:
        place = choose_device(device)
        # Of a folder the name alone: the captions of a published set should not tell where on a disk the model lay.
        self.model = Path(source).resolve().name if Path(source).is_dir() else source
        self.device, self.batch_size = place.type, batch_size
        self._place, self._decoding = place, decoding
        number_type = settled_dtype(dtype, place)
        self._network, self._processor = _load(source, revision, getattr(torch, number_type), place)
        commit = getattr(self._network.config, "_commit_hash", None)
        self.revision = str(commit or revision or "unknown")
        ends = self._network.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends, device=place, dtype=torch.long)

    def answers(self, batches: Iterator[list[Question]]) -> Iterator[list[tuple[Question, Answer]]]:
        """Batch by batch; the pictures of the next one are decoded meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield list(zip(batch, self._answer(batch), strict=True)) if batch else []

    def close(self) -> None:
        """Free the weights, for a second model to have their place."""
        del self._network
        if self._place.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, batch: list[Question]) -> list[Answer]:
        """Answers to a batch; in halves where it does not fit, or where a picture in it is more than the processor takes."""
        try:
            # No name for the inputs here: they would keep their memory while the halves are tried.
            return self._generate(batch, self._prepare(batch))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError(
                    f"the memory of {self._place} does not hold {self.model} and one picture; choose a smaller model=, set "
                    "image_side= or max_new_tokens= lower, or use dtype=bfloat16."
                ) from error
        except ValueError as error:  # what image processors raise, for an aspect ratio beyond their limit for one
            if len(batch) == 1:
                return [Answer(error=str(error)[:200] or type(error).__name__)]
        half = len(batch) // 2
        return self._answer(batch[:half]) + self._answer(batch[half:])

    def _prepare(self, batch: list[Question]) -> Any:
        texts = []
        for question in batch:
            content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
            messages = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        inputs = self._processor(text=texts, images=[[question.image] for question in batch], padding=True, return_tensors="pt")
        # Pixels in the weights' type; ids and masks as they are.
        return inputs.to(self._place, dtype=self._network.dtype)

    @torch.inference_mode()
    def _generate(self, batch: list[Question], inputs: Any) -> list[Answer]:
        draws = LogitsProcessorList()
        if batch[0].temperature > 0:
            seeds = [question.seed for question in batch]
            draws.append(SeededDraw(seeds, batch[0].temperature, self._decoding.top_p, self._place))
        ids = self._network.generate(**inputs, max_new_tokens=self._decoding.max_new_tokens, do_sample=False, logits_processor=draws)
        new = ids[:, inputs["input_ids"].shape[1] :]  # [b, tokens]
        texts = self._processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        is_end = torch.isin(new, self._ends)
        answers = []
        for text, ends in zip(texts, is_end.tolist(), strict=True):
            finished = True in ends
            answers.append(Answer(text, ends.index(True) + 1 if finished else len(ends), finished))
        return answers


class VllmModel(LocalModel):
    """The engine ``vllm``: the same models on GPUs, many questions at once (``batch_size`` of them are handed over together). An
    answer depends on its neighbours and the machine by rounding."""

    def __init__(self, source: str, revision: str | None, dtype: str, batch_size: int, decoding: Decoding) -> None:
        from vllm import LLM, SamplingParams

        self.model = Path(source).resolve().name if Path(source).is_dir() else source
        self.revision, self.device, self.batch_size = revision or "unknown", "cuda", batch_size
        self._place, self._decoding, self._sampling = torch.device("cuda"), decoding, SamplingParams
        hub = {} if whole_files(Path(source)).is_dir() else {"revision": revision}
        try:
            self._network = LLM(
                source, dtype=dtype, trust_remote_code=False, limit_mm_per_prompt={"image": 1}, max_num_seqs=batch_size, seed=0, **hub
            )
        except Exception as error:  # its engine process says what was wrong in a dozen unrelated types
            raise UserError(
                f"vLLM cannot serve the model {source} ({reason_of(error)[:300].rstrip('.')}); it needs a GPU and a model that it knows, "
                "and engine=transformers takes others."
            ) from None

    def _prepare(self, batch: list[Question]) -> Any:
        return [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": q.image}, {"type": "text", "text": q.prompt}]}] for q in batch
        ]

    def _generate(self, batch: list[Question], inputs: Any) -> list[Answer]:
        most, top_p = self._decoding.max_new_tokens, self._decoding.top_p
        draws = [self._sampling(temperature=q.temperature, top_p=top_p if q.temperature else 1.0, max_tokens=most, seed=q.seed % 2**63)
                 for q in batch]  # fmt: skip
        found = [one.outputs[0] for one in self._network.chat(inputs, draws, use_tqdm=False)]
        return [Answer(one.text, len(one.token_ids), one.finish_reason != "length") for one in found]


class SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """Sampling whose draws are a function of each row's own seed, whatever its neighbours are.

    The largest of logits / temperature + Gumbel noise is a draw from their softmax (the Gumbel-max trick), so greedy
    decoding over these scores samples.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [b, vocabulary] whose largest entry in each row is its draw."""
        scores = scores.float() / self._temperature
        if self._nucleus is not None:
            scores = self._nucleus(input_ids, scores)
        noise = torch.stack([torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self._generators]).clamp_(
            1e-20, 1 - 1e-7
        )
        return scores - torch.log(-torch.log(noise))


def _load(source: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """(model, processor), ready to generate."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    revision = None if whole_files(Path(source)).is_dir() else revision
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        network = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub's client and transformers raise a dozen unrelated types
        advice = (
            "expected a folder with a model of transformers' image-text-to-text classes (config.json, *.safetensors, processor files)"
            if Path(source).is_dir()
            else f"fetch it where there is a network (`hf download {source}`), log in with `hf auth login` if it has a gate"
        )
        raise UserError(f"the model {source} cannot be loaded ({reason_of(error)[:300].rstrip('.')}); {advice}.") from None
    if getattr(processor, "chat_template", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"the model {source} has no chat template or no image processor; choose an instruction-tuned one.")
    processor.tokenizer.padding_side = "left"  # generation goes on from the last column
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    settings = network.generation_config
    # Drawing is SeededDraw's; what the model's own file says about it would only be warned about.
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
    settings.pad_token_id = processor.tokenizer.pad_token_id
    placed: Any = network  # its decorated .to() has lost its types
    return placed.to(device).eval(), processor
