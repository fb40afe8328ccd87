"""The demo teacher's text side: a byte-level BPE over the world's captions and a tiny, frozen, random Qwen2.5-VL.

The encoder is not trained: its random embeddings already tell the words apart, and the transformer's text stream
learns to read them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ppcl.demo import world

WIDTH = 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34  # what QwenImagePipeline cuts off the front of every encoded prompt


def new_tokenizer() -> Qwen2Tokenizer:
    """A `Qwen2Tokenizer` in which every word of the template and of the captions is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    plain = TEMPLATE
    for token in SPECIAL:
        plain = plain.replace(token, "")
    bpe.train_from_iterator([plain.format(c.text) for c in world.captions()] * 4, trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.model.save(folder)
        tokenizer = Qwen2Tokenizer(
            vocab=str(Path(folder) / "vocab.json"),
            merges=str(Path(folder) / "merges.txt"),
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            additional_special_tokens=SPECIAL[1:],
        )
    prefix = tokenizer(TEMPLATE.split("{}")[0])["input_ids"]
    if len(prefix) != PREFIX_TOKENS:
        raise RuntimeError(f"the template's prefix has {len(prefix)} tokens, the pipeline cuts off {PREFIX_TOKENS}")
    return tokenizer


def new_text_encoder(vocabulary: int, seed: int, width: int = WIDTH) -> Qwen2_5_VLForConditionalGeneration:
    """One layer of random weights, with heads of 16 channels."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 1,
            "num_attention_heads": width // 16,
            "num_key_value_heads": width // 32,
            "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            "rope_scaling": rope,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@torch.no_grad()
def encode(pipeline: QwenImagePipeline, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings `(N, length, WIDTH)` and their mask `(N, length)`, padded with zeros."""
    embeddings = torch.zeros(len(texts), length, WIDTH)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for start in range(0, len(texts), 64):
        chunk = texts[start : start + 64]
        e, m = pipeline.encode_prompt(chunk)
        embeddings[start : start + len(chunk), : e.shape[1]] = e
        mask[start : start + len(chunk), : e.shape[1]] = 1 if m is None else m
    return embeddings, mask
