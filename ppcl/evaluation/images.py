"""Pictures of a variant, made by the stock pipeline with the teacher's seeds, and the seconds a step takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ppcl.config.schema import Sampling
from ppcl.replacements.plan import Interval

_TIMED_STEPS = 6
_TIMED_ROUNDS = 3


def image_path(folder: Path, variant: str, index: int) -> Path:
    return folder / "pictures" / variant / f"{index:04d}.png"


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    on_step_end: Callable[[], None] | None = None,
) -> np.ndarray:
    """One batch of pictures `(N, H, W, 3)` uint8; each has its own generator, so its noise depends on its seed alone."""

    def step_end(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step_end is not None:
            on_step_end()
        return tensors

    pictures = pipeline(
        prompt=list(prompts),
        height=sampling.height,
        width=sampling.width,
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        callback_on_step_end=step_end,
        **_for_batch(sampling.arguments, len(prompts)),
    ).images
    return (np.asarray(pictures) * 255).round().clip(0, 255).astype(np.uint8)


def _for_batch(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A single negative prompt for every picture: not every stock pipeline repeats it for a batch."""
    return {
        name: [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in arguments.items()
    }


def save_images(pictures: np.ndarray, paths: Sequence[Path]) -> None:
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def load_images(paths: Sequence[Path]) -> np.ndarray:
    """`(N, H, W, 3)` uint8."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def seconds_per_step(
    pipeline: Any,
    switch: Callable[[nn.Module, Sequence[Interval]], None],
    variants: Mapping[str, Sequence[Interval]],
    prompts: Sequence[str],
    sampling: Sampling,
) -> dict[str, float]:
    """The median seconds one denoising step of this batch takes, by variant. The teacher is left plugged in.

    Variants take turns, round after round, so that a drift of the machine's speed falls on all of them alike. The
    first step of each turn is not counted. Encoding the prompts and decoding the pictures are not in it.
    """
    # A first step that is not counted, and at least one that is.
    short = sampling.model_copy(update={"steps": max(2, min(sampling.steps, _TIMED_STEPS))})
    seeds = range(len(prompts))
    taken: dict[str, list[float]] = {name: [] for name in variants}

    def turn(name: str) -> list[float]:
        ends: list[float] = []

        def step_end() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        switch(pipeline.transformer, variants[name])
        generate_images(pipeline, prompts, seeds, short, step_end)
        return [after - before for before, after in zip(ends, ends[1:])]

    try:
        turn(next(iter(variants)))
        for _ in range(_TIMED_ROUNDS):
            for name in variants:
                taken[name] += turn(name)
    finally:
        switch(pipeline.transformer, ())
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
