"""Train a small CLIP model of the shapes world, so that CLIPScore can be looked at beside the prompt checker.

    python -m ppcl.demo.train_clip --output demo/clip

Pictures and captions are the world's own; captions that are held out of the teacher's training are held out of this
too. The folder is a `CLIPModel` with its processor as transformers saves them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from ppcl.demo import text_encoders, world
from ppcl.demo.train_vae import scenes

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]
TOKENS = 24


def new_processor() -> CLIPProcessor:
    """Every word of the captions is one token."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *text_encoders.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )
    side = {"height": world.CANVAS, "width": world.CANVAS}
    images = CLIPImageProcessor(size={"shortest_edge": world.CANVAS}, crop_size=side)
    return CLIPProcessor(images, fast)


def new_model(vocabulary: int, seed: int, width: int = 96) -> CLIPModel:
    torch.manual_seed(seed)
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        **shared,
        num_hidden_layers=3,
        vocab_size=vocabulary,
        max_position_embeddings=TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(**shared, num_hidden_layers=4, image_size=world.CANVAS, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def loss_of(model: CLIPModel, pixels: torch.Tensor, tokens: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The contrastive loss, and the share of pictures whose own caption is the nearest, or one like it."""
    logits = model(pixel_values=pixels, **tokens).logits_per_image
    ids = tokens["input_ids"]
    same = (ids[:, None] == ids[None]).all(-1).float()
    targets = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2
    return loss, float(same[torch.arange(len(ids)), logits.argmax(1)].mean())


def train(options: argparse.Namespace) -> None:
    processor = new_processor()
    model = new_model(len(processor.tokenizer), options.seed).to(options.device)
    pictures, texts = scenes(options.scenes, np.random.default_rng(options.seed))
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    tokens = processor(text=texts, return_tensors="pt", padding="max_length", max_length=TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {options.steps} steps", flush=True)
    generator, started_at = torch.Generator().manual_seed(options.seed), time.monotonic()
    for step in range(options.steps):
        rows = torch.randint(options.scenes, (options.batch,), generator=generator)
        some = {name: values[rows].to(options.device) for name, values in tokens.items()}
        loss, right = loss_of(model, pixels[rows].to(options.device), some)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        warmup.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        if step % 50 == 0 or step == options.steps - 1:
            left = (time.monotonic() - started_at) / (step + 1) * (options.steps - step - 1)
            print(
                f"step {step + 1} of {options.steps}, loss {loss:.3f}, right {right:.0%}, {left:.0f} s left", flush=True
            )
    model.bfloat16().save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"{options.output}: {sum(f.stat().st_size for f in options.output.iterdir()) / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
