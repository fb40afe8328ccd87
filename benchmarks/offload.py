"""Memory and time of each mode of `memory.offload`, and whether its images are those of `none`, bit by bit.

    python benchmarks/offload.py demo/teacher
    python benchmarks/offload.py /models/qwen-image --size 1024 --steps 20 --json offload.json

On a GPU the peak is the allocator's; on the CPU it is the weights that would be on a device at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.config.schema import Memory, Sampling
from ppcl.errors import UserError
from ppcl.evaluation.images import generate_images
from ppcl.models.placement import Images, place
from ppcl.models.teacher import Teacher

MODES = ("none", "model", "group")


def measure(teacher: Teacher, mode: str, prompts: list[str], sampling: Sampling, device: str) -> dict[str, Any]:
    """Two batches of images: the first one warms up, the second one is timed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = teacher.pipeline("cpu", dtype)
    images = Images(len(prompts), sampling.height, sampling.width)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    placement = place(pipeline, device, Memory(offload=mode), images)
    for _ in range(2):
        started_at = time.perf_counter()
        made = generate_images(pipeline, prompts, range(len(prompts)), sampling)
        seconds = time.perf_counter() - started_at
    cache = placement.cache
    at_once = placement.needs.resident + (cache.most_held if cache else placement.needs.cached("none"))
    return {
        "mode": mode,
        "peak_gb": (torch.cuda.max_memory_allocated() if device == "cuda" else at_once) / 1e9,
        "estimated_gb": placement.needs.total(mode) / 1e9,
        "copied_gb": (cache.copied if cache else 0) / 1e9,
        "seconds": seconds,
        "images": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="folder of a diffusers pipeline, or s3://bucket/key")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images, pixels")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--prompt", default="a photo of a red circle")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    teacher = Teacher(options.teacher)
    sampling = Sampling(steps=options.steps, height=options.size, width=options.size)
    rows = []
    for mode in MODES:
        try:
            rows.append(measure(teacher, mode, [options.prompt] * options.batch, sampling, options.device))
        except UserError as error:
            print(f"{mode}: {error}")
        gc.collect()
    first = rows[0].pop("images") if rows else None
    table = Table("mode", "peak, GB", "estimated, GB", "copied, GB", "seconds", f"as {rows[0]['mode']}" if rows else "")
    for row in rows:
        row["same"] = bool(np.array_equal(row.pop("images", first), first))
        figures = (f"{row[name]:.3g}" for name in ("peak_gb", "estimated_gb", "copied_gb", "seconds"))
        table.add_row(row["mode"], *figures, "the same bits" if row["same"] else "others")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"device": options.device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
