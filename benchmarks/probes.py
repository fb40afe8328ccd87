"""Linear probes in closed form against the same probes trained by gradient (PPCL's Eq. 2): seconds and held-out loss.

    python benchmarks/probes.py --teacher demo/teacher

Both get the same tokens, which the teacher leaves on its own sampling trajectories and which lie in memory, so that the
teacher's forwards, needed by either, are not in the times. Gradient training is Adam on minibatches of tokens from
zero, as the block's identity start, with a cosine schedule; each ridge and learning rate is a row of its own. The loss
is the share of the variance of `X_i - X_{i-1}` that the probe leaves, on the tokens fitted to and on those of held-out
prompts, a mean over the blocks that change the stream.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.encoding import EncodedPrompts, collate, encode
from ppcl.calibration.trajectory_recorder import StateSettings, record
from ppcl.config.schema import Probes, Sampling
from ppcl.linalg import Moments, Probe
from ppcl.models import Streams, embed, run_blocks
from ppcl.models.teacher import Teacher

# Of one block and stream: the tokens behind the block before, and what the block adds to them, `(n, d)` each.
Pair = tuple[torch.Tensor, torch.Tensor]
CHUNK = 8  # prompts a sampling run


@torch.no_grad()
def pairs(options: argparse.Namespace, prompts: list[str], first_id: int) -> dict[tuple[int, str], Pair]:
    """The tokens of `options.states` states of each prompt, by block and stream; padding left out."""
    teacher = Teacher(options.teacher)
    pipeline, adapter = teacher.pipeline(), teacher.adapter
    sampling = Sampling(steps=options.sampling_steps, height=options.size, width=options.size)
    found: dict[tuple[int, str], list[Pair]] = {}
    for start in range(0, len(prompts), CHUNK):
        texts = prompts[start : start + CHUNK]
        ids = [first_id + start + i for i in range(len(texts))]
        embeddings = encode(pipeline, adapter, texts, sampling)
        settings = StateSettings(sampling, options.states, options.seed)
        states, call = record(pipeline, adapter, EncodedPrompts(ids, embeddings), settings)
        text = collate([embeddings[ids.index(s.embedding_id)] for s in states], adapter)
        inputs = {
            adapter.latents: torch.stack([s.latents for s in states]),
            adapter.timestep: torch.tensor([s.timestep for s in states]),
            **{name: [[tuple(shape) for shape in value]] * len(states) for name, value in call.each.items()},
            **text,
        }
        streams, context = embed(pipeline.transformer, inputs)
        mask = text[adapter.text_mask] if adapter.text_mask else None
        for number, block in enumerate(adapter.blocks(pipeline.transformer)):
            after = run_blocks(adapter, [block], streams, context)
            for name in Streams._fields:
                x, y = (getattr(s, name) for s in (streams, after))
                x, y = (t[mask.bool()] if name == "txt" and mask is not None else t.flatten(0, 1) for t in (x, y))
                found.setdefault((number, name), []).append((x, y - x))
            streams = after
    return {key: tuple(torch.cat(parts) for parts in zip(*those)) for key, those in found.items()}


def closed(ridge: float) -> Callable[[torch.Tensor, torch.Tensor, int], Probe]:
    def fit(x: torch.Tensor, y: torch.Tensor, seed: int) -> Probe:
        statistics = Moments(x.shape[1], y.shape[1])
        statistics.update(x, y)
        return Probe.fit(statistics, ridge)[0]

    return fit


def trained(steps: int, batch: int, rate: float) -> Callable[[torch.Tensor, torch.Tensor, int], Probe]:
    """Fit by Adam, the squared error of Eq. 2."""

    def fit(x: torch.Tensor, y: torch.Tensor, seed: int) -> Probe:
        generator = torch.Generator().manual_seed(seed)
        linear = torch.nn.Linear(x.shape[1], y.shape[1])
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.Adam(linear.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=generator)
            loss = (linear(x[rows]) - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return Probe(linear.weight.detach(), linear.bias.detach())

    return fit


def left(probe: Probe, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of Y's variance that a probe leaves."""
    wrong = probe(x) - x - y
    return float(wrong.square().sum() / (y - y.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("demo/teacher"), help="a pipeline folder")
    parser.add_argument("--prompts", type=Path, default=Path("demo/prompts.txt"), help="one prompt a line")
    parser.add_argument("--fit", type=int, default=48, help="prompts to fit on")
    parser.add_argument("--held-out", type=int, default=16, help="prompts to measure on")
    parser.add_argument("--states", type=int, default=4, help="states of each prompt's trajectory")
    parser.add_argument("--sampling-steps", type=int, default=20, help="denoising steps of a trajectory")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, pixels")
    parser.add_argument(
        "--ridges",
        type=float,
        nargs="+",
        default=[Probes().ridge, 1e-4, 1e-2],
        help="ridges of the closed form; ratios are to the first",
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps of Adam, of each probe")
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step of Adam")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4], help="learning rates of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()

    prompts = options.prompts.read_text().splitlines()
    fitted = pairs(options, prompts[: options.fit], 0)
    held_out = pairs(options, prompts[options.fit : options.fit + options.held_out], options.fit)
    # A block that leaves a stream as it is, as the last one may leave the text, has nothing to fit.
    fitted = {key: (x, y) for key, (x, y) in fitted.items() if y.any()}
    ways = {f"closed {ridge:g}": closed(ridge) for ridge in options.ridges}
    ways |= {f"Adam {rate:g}": trained(options.steps, options.batch, rate) for rate in options.rates}
    figures = {}
    for name, fit in ways.items():
        begun = time.perf_counter()
        probes = {key: fit(x, y, options.seed) for key, (x, y) in fitted.items()}
        seconds = time.perf_counter() - begun
        losses = {key: left(probe, *held_out[key]) for key, probe in probes.items()}
        row = figures[name] = {"seconds": seconds}
        for stream in Streams._fields:
            row[f"{stream}_fitted"] = float(np.mean([left(p, *fitted[k]) for k, p in probes.items() if k[1] == stream]))
            row[f"{stream}_held_out"] = float(np.mean([loss for k, loss in losses.items() if k[1] == stream]))
        row |= {
            "by_probe": {f"{block} {stream}": loss for (block, stream), loss in losses.items()},
        }
    base = next(iter(figures.values()))
    for row in figures.values():
        row["ratio"] = {name: row[name] / base[name] for name in ("seconds", "img_held_out", "txt_held_out")}

    x = fitted[0, "img"][0]
    title = f"{len(fitted)} probes of width {x.shape[1]}, {len(x)} image tokens each, {options.steps} steps of Adam"
    table = Table("probes", "seconds", "ratio", title=title)
    for stream in Streams._fields:
        for column in (f"{stream} fitted", "held out", "ratio"):
            table.add_column(column)
    for name, row in figures.items():
        ratio = row["ratio"]
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{ratio['seconds']:.1f}",
            f"{row['img_fitted']:.4f}",
            f"{row['img_held_out']:.4f}",
            f"{ratio['img_held_out']:.3f}",
            f"{row['txt_fitted']:.4f}",
            f"{row['txt_held_out']:.4f}",
            f"{ratio['txt_held_out']:.3f}",
        )
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        setup = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "json"}
        setup |= {
            "probes": len(fitted),
            "width": x.shape[1],
            "image_tokens": len(x),
            "threads": torch.get_num_threads(),
        }
        options.json.write_text(json.dumps({"setup": setup, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
