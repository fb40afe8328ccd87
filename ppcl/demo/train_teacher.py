"""Train a demo teacher on the shapes world, on a CPU or a GPU: a stock pipeline of one of three families.

    python -m ppcl.demo.train_vae --output demo/checkpoints/vae
    python -m ppcl.demo.train_teacher --vae demo/checkpoints/vae --output demo/teacher

The first teacher, a Qwen-Image of 16 blocks, learns from the world's scenes. FLUX.1 and Stable Diffusion 3.5 learn
from its velocities, which takes less steps, and have a VAE of their own kind with the same latents:

    python -m ppcl.demo.train_image_vae --like demo/teacher/vae --output demo/checkpoints/image_vae
    python -m ppcl.demo.train_teacher --family flux --taught-by demo/teacher --guidance 1 3 --steps 5000 \\
        --vae demo/checkpoints/image_vae --work demo/checkpoints/flux --output demo/flux
    python -m ppcl.demo.train_teacher --family sd3 --taught-by demo/teacher --guidance 1.5 1.5 --steps 5000 \\
        --vae demo/checkpoints/image_vae --work demo/checkpoints/sd3 --output demo/sd3

The run writes a checkpoint every few minutes and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl.demo.families import FAMILIES, Family
from ppcl.demo.lessons import Lesson, Scenes, Velocities
from ppcl.demo.score_teacher import score
from ppcl.demo.store_bfloat16 import store_bfloat16
from ppcl.storage.atomic import replacing

EMA_DECAY = 0.999


class TeacherTraining:
    """The transformer in training: optimizer, average of the weights, loss curve, and their checkpoint."""

    def __init__(self, family: Family, options: argparse.Namespace):
        model = family.transformer
        self.family, self.model, self.options, self.work = family, model, options, options.work
        self.parameters = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step = 0
        self.curve: list[dict] = []

    def train_step(self, lesson: Lesson) -> float:
        """One step on a batch that the step's number alone decides; gives the loss."""
        self._set_rate()
        loss = self._loss(lesson)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        self.step += 1
        return loss.item()

    def _set_rate(self) -> None:
        # Constant, then to zero in the last third (warmup-stable-decay).
        steps = self.options.steps
        share = min(1.0, (self.step + 1) / 200, 3 * (steps - self.step) / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * share

    def _loss(self, lesson: Lesson) -> torch.Tensor:
        batch = lesson.batch(self.step, self.options.batch)
        device = self.options.device
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = self.family.velocity(batch)
        return (velocity.float() - batch.target).square().mean()

    def save(self) -> None:
        """Write a checkpoint beside the old one, then take its place in one rename."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"model.{name}": p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {})
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if key != "step"}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(self.work / "checkpoint.safetensors") as partial:
            save_file(contiguous, partial, metadata={"step": str(self.step)})
            (self.work / "curve.json").write_text(json.dumps(self.curve))

    @torch.no_grad()
    def load(self) -> None:
        """Resume from the work folder's checkpoint; does nothing where there is none."""
        path = self.work / "checkpoint.safetensors"
        if not path.exists():
            return
        state = load_file(path, device=self.options.device)
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        self.curve = [c for c in json.loads((self.work / "curve.json").read_text()) if c["step"] < self.step]
        for name, p in self.parameters.items():
            p.copy_(state[f"model.{name}"])
            self.ema[name].copy_(state[f"ema.{name}"])
            if f"optimizer.{name}.exp_avg" in state:
                moments = {key: state[f"optimizer.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        print(f"continuing from step {self.step}", flush=True)

    @torch.no_grad()
    def use_ema(self) -> None:
        """Put the average of the weights in their place."""
        for name, p in self.parameters.items():
            p.copy_(self.ema[name])


def lesson_of(family: Family, options: argparse.Namespace) -> Lesson:
    """What the options say the teacher learns from; what is computed for it stays in the work folder."""
    options.work.mkdir(parents=True, exist_ok=True)
    taught_by = None
    if options.taught_by is not None:
        taught_by = QwenImagePipeline.from_pretrained(options.taught_by).to(options.device)
    vae = (taught_by or family.pipeline).vae.to(options.device)
    scenes = Scenes(vae, options.scenes, options.seed, options.work, options.device)
    if taught_by is None:
        return scenes
    low, high = options.guidance
    return Velocities(taught_by, scenes, options.velocities, (low, high), options.work)


def train(options: argparse.Namespace) -> tuple[Family, list[dict]]:
    """Train the transformer; gives the whole family, its pipeline among it, and the loss curve."""
    torch.manual_seed(options.seed)
    family = FAMILIES[options.family](options.vae, options.seed)
    family.pipeline.set_progress_bar_config(disable=True)
    lesson = lesson_of(family, options)
    family.read(lesson.vocabulary, options.device)
    family.transformer.to(options.device)
    training = TeacherTraining(family, options)
    training.load()
    if options.compile:
        family.pipeline.transformer.compile_repeated_blocks()
    first, started_at, running = training.step, time.monotonic(), None
    for step in range(first, options.steps):
        loss, last = training.train_step(lesson), step == options.steps - 1
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 50 == 0 or last:
            training.curve.append({"step": step, "loss": round(running, 5)})
            pace = (time.monotonic() - started_at) / (step + 1 - first)
            left = pace * (options.steps - step - 1) / 60
            print(f"step {step}/{options.steps} loss {running:.4f} {pace:.2f} s/step, {left:.0f} min left", flush=True)
        if (step + 1) % options.checkpoint_every == 0 or last:
            training.save()
    training.use_ema()
    return family, training.curve


def main() -> None:
    options = _parser().parse_args()
    family, curve = train(options)
    family.pipeline.to("cpu").save_pretrained(options.output)
    store_bfloat16(options.output)
    scores = score(family.pipeline, options.per_category, options.sampling_steps, seed=1)
    named = ("family", "seed", "steps", "batch", "scenes", "learning_rate", "sampling_steps", "guidance")
    record = {name: getattr(options, name) for name in named}
    record |= {"images_per_category": options.per_category, "scores": scores}
    record |= {"vae": json.loads((options.vae / "training.json").read_text()), "curve": curve}
    (options.output / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(scores, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen_image")
    parser.add_argument("--vae", type=Path, required=True, help="folder written by train_vae or train_image_vae")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo/checkpoints/teacher"), help="checkpoints and latents")
    parser.add_argument("--taught-by", type=Path, help="a trained Qwen-Image demo teacher, to learn its velocities")
    parser.add_argument("--velocities", type=int, default=120_000, help="samples whose velocities are computed")
    parser.add_argument("--guidance", type=float, nargs=2, default=(1.0, 1.0), help="lowest and highest scale in them")
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
    return parser


if __name__ == "__main__":
    main()
