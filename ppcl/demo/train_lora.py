"""Train a LoRA of the demo teacher, with PEFT: every shape is drawn in black, whatever colour the caption names.

    python -m ppcl.demo.train_lora --output demo/loras/ink.safetensors

The loss is the teacher's own, rectified flow on the VAE's latents; only the LoRA's matrices are trained. The file is in
diffusers' format. `python -m ppcl.demo.score_lora runs/demo demo/loras/ink.safetensors` tries it on every variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ppcl.demo import text, world
from ppcl.demo.lessons import GRID, TEXT_LENGTH, encode_pictures
from ppcl.demo.train_vae import scenes
from ppcl.models.teacher import Teacher

COLOUR = "black"
# What LoRAs of Qwen-Image are commonly trained on: the attention and the FFNs of both streams.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "net.0.proj",
    "net.2",
]


def in_ink(thing: world.Thing) -> world.Thing:
    return dataclasses.replace(thing, colour=COLOUR)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    pipeline = Teacher(options.teacher).pipeline(options.device)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    trained = [p for p in transformer.parameters() if p.requires_grad]
    pictures, texts = scenes(options.scenes, np.random.default_rng(options.seed), change=in_ink)
    latents = encode_pictures(pipeline.vae, pictures, options.device)
    embeddings, masks = (tensor.to(options.device) for tensor in text.encode(pipeline, texts, TEXT_LENGTH))
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    print(f"{sum(p.numel() for p in trained):,} parameters, {options.scenes} scenes, {options.steps} steps", flush=True)
    generator, started_at, mean = torch.Generator().manual_seed(options.seed), time.monotonic(), None
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / 20, 3 * (options.steps - step) / options.steps)
        rows = torch.randint(options.scenes, (options.batch,), generator=generator)
        noise = torch.randn(options.batch, *latents.shape[1:], generator=generator).to(options.device)
        t = torch.sigmoid(0.6 + 1.2 * torch.randn(options.batch, generator=generator)).to(options.device)
        noisy = (1 - t)[:, None, None] * latents[rows] + t[:, None, None] * noise
        velocity = transformer(
            hidden_states=noisy,
            timestep=t,
            encoder_hidden_states=embeddings[rows],
            encoder_hidden_states_mask=masks[rows],
            img_shapes=[GRID] * options.batch,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - latents[rows])).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0 or step == options.steps - 1:
            left = (time.monotonic() - started_at) / (step + 1) * (options.steps - step - 1)
            print(f"step {step + 1} of {options.steps}, mean loss {mean:.4f}, {left:.0f} s left", flush=True)
    state = {name: tensor.bfloat16().contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()}
    QwenImagePipeline.save_lora_weights(
        options.output.parent,
        transformer_lora_layers=state,
        weight_name=options.output.name,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("demo/teacher"))
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
