"""A tiny random Llama with its own tokenizer, for tests and for trying a cluster out: it loads like the real ones."""

from __future__ import annotations

from pathlib import Path

VERSION = "v1"

# What the byte-pair tokenizer is trained on: the words of the built-in scenes and of ordinary captions.
CORPUS = (
    """a an the of in on at to and with is are picture image shows small medium large big tiny red orange yellow
green cyan teal blue purple pink brown white black grey gray navy beige circle square triangle star diamond cross plus heart
ring disc box shape object striped plain outlined solid filled stripes outline dotted gradient top bottom left right centre
center middle upper lower corner side edge background above below beside near next between there scene one two three four
first second third another other both each further also while against drawn placed sits stands lies rests stretches fills"""
    * 4
)


def build_tiny(folder: Path) -> None:
    """Write the model (2 layers, width 64, fixed seed) and its tokenizer (512 byte-level pieces) to ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaModel(config).save_pretrained(folder)
