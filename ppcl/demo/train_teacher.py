"""Train the demo teacher: a stock `QwenImagePipeline` of 16 blocks on the shapes world, on a CPU or a GPU.

    python -m ppcl.demo.train_vae --output demo/checkpoints/vae
    python -m ppcl.demo.train_teacher --vae demo/checkpoints/vae --output demo/teacher

Rectified flow on the VAE's latents (Liu et al. 2022, arXiv 2209.03003): `x_t = (1 - t) x + t e`, target `e - x`. Each
latent is encoded once. The run writes a checkpoint every few minutes and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file

from ppcl.demo import text, world
from ppcl.demo.score_teacher import score
from ppcl.demo.train_vae import Z_DIM, scenes, single_frame_convolutions, to_unit

BLOCKS, HEADS, HEAD_DIM = 16, 4, 24
TEXT_LENGTH = 15  # tokens of the longest caption, template included
UNCONDITIONAL_SHARE = 0.05
EMA_DECAY = 0.999
SHIFT = 2.0  # what a picture shows is settled at high noise: sample there more closely
# Scenes of these come more often: they are learnt last.
CATEGORY_WEIGHT = {"position": 3.0, "counting": 2.0}
GRID = [(1, 4, 4)]  # the latent 8 × 8 in patches of 2


def new_transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=text.WIDTH,
        axes_dims_rope=(8, 8, 8),
    )
    # adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748): every block starts as the identity.
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def new_pipeline(vae: AutoencoderKLQwenImage, transformer: QwenImageTransformer2DModel, seed: int) -> QwenImagePipeline:
    tokenizer = text.new_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.new_text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_scenes(vae: AutoencoderKLQwenImage, count: int, seed: int, device: str) -> tuple[torch.Tensor, list[str]]:
    """Normalised, packed latents `(count, 16, 32)` of training scenes, with their captions."""
    pictures, texts = scenes(count, np.random.default_rng(seed))
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(device)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(device)
    packed = []
    with single_frame_convolutions():
        for index, chunk in enumerate(pictures.split(64)):
            z = (vae.encode(to_unit(chunk).to(device)).latent_dist.mode() - mean) / std
            packed.append(QwenImagePipeline._pack_latents(z, len(z), Z_DIM, 8, 8).cpu())
            if index % 100 == 0:
                print(f"encoded {index * 64}/{count} scenes", flush=True)
    return torch.cat(packed), texts


def _save(folder: Path, step: int, tensors: dict[str, torch.Tensor], curve: list[dict]) -> None:
    """Write a checkpoint beside the old one, then take its place in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "checkpoint.partial"
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    (folder / "curve.json").write_text(json.dumps(curve))
    os.replace(partial, folder / "checkpoint.safetensors")


def train(options: argparse.Namespace) -> tuple[QwenImagePipeline, list[dict]]:
    device, work = options.device, options.work
    torch.manual_seed(options.seed)
    vae = AutoencoderKLQwenImage.from_pretrained(options.vae).to(device).eval()
    model = new_transformer().to(device)
    pipeline = new_pipeline(vae, model, options.seed)

    cache = work / "latents.safetensors"
    if not cache.exists():
        work.mkdir(parents=True, exist_ok=True)
        latents, texts = encode_scenes(vae, options.scenes, options.seed, device)
        save_file({"latents": latents}, cache, metadata={"texts": json.dumps(texts)})
    from safetensors import safe_open

    with safe_open(cache, "pt") as file:
        latents, texts = file.get_tensor("latents").to(device), json.loads(file.metadata()["texts"])

    vocabulary = sorted(set(texts)) + [" "]
    pipeline.text_encoder.to(device)
    embeddings, masks = (x.to(device) for x in text.encode(pipeline, vocabulary, TEXT_LENGTH))
    number = {t: i for i, t in enumerate(vocabulary)}
    caption = torch.tensor([number[t] for t in texts], device=device)
    category = {c.text: c.category for c in world.captions()}
    weights = torch.tensor([CATEGORY_WEIGHT.get(category[t], 1.0) for t in texts])

    parameters = dict(model.named_parameters())
    ema = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first, curve = 0, []
    if (work / "checkpoint.safetensors").exists():
        state = load_file(work / "checkpoint.safetensors", device=device)
        with safe_open(work / "checkpoint.safetensors", "pt") as file:
            first = int(file.metadata()["step"])
        curve = [c for c in json.loads((work / "curve.json").read_text()) if c["step"] < first]
        with torch.no_grad():
            for k, p in parameters.items():
                p.copy_(state[f"model.{k}"])
                ema[k].copy_(state[f"ema.{k}"])
            for k, p in parameters.items():
                if f"optimizer.{k}.exp_avg" in state:
                    moments = {name: state[f"optimizer.{k}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {"step": torch.tensor(float(first)), **moments}
        print(f"continuing from step {first}", flush=True)

    if options.compile:
        model.compile_repeated_blocks()
    begun, running = time.monotonic(), None
    for step in range(first, options.steps):
        # Constant, then to zero in the last third (warmup-stable-decay).
        rate = options.learning_rate * min(1.0, (step + 1) / 200, 3 * (options.steps - step) / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Seeded by the step: a continued run sees the batches an undisturbed one would have seen.
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        rows = torch.multinomial(weights, options.batch, replacement=True, generator=generator).to(device)
        noise = torch.randn(options.batch, *latents.shape[1:], generator=generator).to(device)
        t = torch.sigmoid(0.6 + 1.2 * torch.randn(options.batch, generator=generator)).to(device)
        drop = torch.rand(options.batch, generator=generator).to(device) < UNCONDITIONAL_SHARE
        index = torch.where(drop, len(vocabulary) - 1, caption[rows])
        clean = latents[rows]
        noisy = (1 - t)[:, None, None] * clean + t[:, None, None] * noise
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = model(
                hidden_states=noisy,
                timestep=t,
                encoder_hidden_states=embeddings[index],
                encoder_hidden_states_mask=masks[index],
                img_shapes=[GRID] * options.batch,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - clean)).square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], weight)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == options.steps - 1:
            curve.append({"step": step, "loss": round(running, 5)})
            pace = (time.monotonic() - begun) / (step + 1 - first)
            left = pace * (options.steps - step - 1) / 60
            print(f"step {step}/{options.steps} loss {running:.4f} {pace:.2f} s/step, {left:.0f} min left", flush=True)
        if (step + 1) % options.checkpoint_every == 0 or step == options.steps - 1:
            tensors = {f"ema.{k}": v for k, v in ema.items()} | {f"model.{k}": p.data for k, p in parameters.items()}
            for k, p in parameters.items():
                tensors |= {f"optimizer.{k}.{n}": v for n, v in optimizer.state.get(p, {}).items() if n != "step"}
            _save(work, step + 1, tensors, curve)
    with torch.no_grad():
        for k, p in parameters.items():
            p.copy_(ema[k])
    return pipeline, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder written by ppcl.demo.train_vae")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo/checkpoints/teacher"), help="checkpoints and latents")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--per-category", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pipeline, curve = train(options)
    pipeline.to("cpu").save_pretrained(options.output)
    scores = score(pipeline, options.per_category, options.sampling_steps, seed=1)
    record = {
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "scenes": options.scenes,
        "learning_rate": options.learning_rate,
        "sampling_steps": options.sampling_steps,
        "images_per_category": options.per_category,
        "scores": scores,
        "vae": json.loads((options.vae / "training.json").read_text()),
        "curve": curve,
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
