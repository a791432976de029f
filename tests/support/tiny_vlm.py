"""Tiny random vision-language models on disk, with processors and chat templates, of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MARKS = {
    "qwen3_vl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "gemma3": ["<pad>", "<bos>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "internvl": ["<pad>", "<s>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
}  # fmt: skip
# What the processor of a family asks its tokenizer for by name.
NAMED = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    },
}  # fmt: skip
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)
TEMPLATES = {
    "qwen3_vl": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma3": PLAIN.replace("IMAGE", "<start_of_image>"),
    "internvl": PLAIN.replace("IMAGE", "<IMG_CONTEXT>"),
}

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def write_vlm(folder: Path, family: str = "qwen3_vl", seed: int = 0) -> Path:
    """Model and processor in the transformers layout: 250 thousand parameters, one token a byte."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = MAKERS[family](_tokenizer(family))
        for name, parameter in model.named_parameters():
            # Weights as small as they start would give every picture nearly the same words.
            if parameter.ndim > 1 and "embed" not in name:
                parameter.data = 6 * parameter.data if parameter.any() else 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = MARKS[family]
    pieces = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=marks[2], pad_token=marks[0], extra_special_tokens=NAMED.get(family, marks[1:])
    )


def _text(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**_text(len(tokenizer)), "rope_parameters": rope},
        vision_config=vision,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    images = Qwen2VLImageProcessor(
        patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    processor = Qwen3VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(),
        chat_template=TEMPLATES["qwen3_vl"],
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    config = Gemma3Config(
        vision_config=VISION,
        text_config=_text(len(tokenizer)),
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
    )
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=TEMPLATES["gemma3"])
    return Gemma3ForConditionalGeneration(config), processor


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen3", **_text(len(tokenizer))},
        image_token_id=3,
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True)
    processor = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=TEMPLATES["internvl"])
    return InternVLForConditionalGeneration(config), processor


MAKERS = {"qwen3_vl": _qwen3_vl, "gemma3": _gemma3, "internvl": _internvl}
