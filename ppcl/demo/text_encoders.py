"""Frozen, random CLIP and T5 text encoders over the world's words, each word one token.

They are not trained: random embeddings tell the words apart. But a caption's order must be in what they give, because
FLUX.1 and SD3.5 put no positions on text. So CLIP's positions and T5's relative positions weigh as much as the words.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ppcl.demo import world

_LETTERS = string.ascii_lowercase
TOKENS = 12  # of the longest caption: ten words, a start and an end


def words() -> list[str]:
    return sorted({word for caption in world.captions() for word in caption.text.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """A BPE in which every word of the captions is one token; other words fall into their letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=list(_LETTERS))
    bpe.train_from_iterator([caption.text for caption in world.captions()], trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.model.save(folder)
        vocabulary = json.loads((Path(folder) / "vocab.json").read_text())
        lines = (Path(folder) / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split()) for line in lines if not line.startswith("#")]
    for letter in _LETTERS:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def clip(tokenizer: CLIPTokenizer, width: int, projected: bool, seed: int) -> nn.Module:
    """Two layers, heads of 16 channels. With a projection: as SD3.5 takes it; without: as FLUX.1 does."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(letter, -8.0) for letter in _LETTERS] + [(f"▁{word}", -1.0) for word in words()]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5(tokenizer: T5Tokenizer, width: int, seed: int) -> T5EncoderModel:
    """One layer; each of its heads of 16 channels looks at words at a few distances."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=2 * width, num_layers=1, num_heads=width // 16
    )
    model = T5EncoderModel(config).eval()
    attention = model.encoder.block[0].layer[0].SelfAttention
    nn.init.normal_(attention.relative_attention_bias.weight, std=3.0)
    for linear in (attention.v, attention.o):
        nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
    return model
