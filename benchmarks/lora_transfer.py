"""What each step of a LoRA's transfer to students brings on the demo: shapes in its colour, and images right.

    python benchmarks/lora_transfer.py runs/demo demo/loras/ink.safetensors --images 152 --seed 5

`block` is the update of block `u` alone, `both` with the least-squares map behind the student.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.demo import world
from ppcl.demo.score_lora import measures
from ppcl.demo.score_teacher import draw
from ppcl.lora import AppliedLora, LoraTransfer, StudentUpdate
from ppcl.result import Result

_BATCH = 48


def block_alone(applied: AppliedLora) -> AppliedLora:
    """The same transfer without the maps behind students."""
    assert applied.transfer is not None
    students = {
        file: StudentUpdate({p: one for p, one in update.layers.items() if p.startswith("block.")}, update.origins)
        for file, update in applied.transfer.students.items()
    }
    return replace(applied, transfer=LoraTransfer(students))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", help="what ppcl compress wrote")
    parser.add_argument("lora", help="the .safetensors file")
    parser.add_argument("--variants", nargs="+", default=["half", "all"])
    parser.add_argument("--images", type=int, default=152)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", help="a JSON file to write the figures to")
    options = parser.parse_args()
    result = Result(options.result)
    held_out = [caption.text for caption in world.captions() if caption.held_out]
    prompts = [str(p) for p in np.random.default_rng(options.seed).choice(held_out, options.images, replace=False)]
    pipeline = result.pipeline()
    (both,) = result.transferred_loras(options.variants, [options.lora])
    steps = {"none": replace(both, transfer=None), "block": block_alone(both), "both": both}
    rows = []
    for name in options.variants:
        for step, applied in steps.items():
            result.switch(pipeline, name, applied)
            black, right = measures(draw(pipeline, prompts, options.sampling_steps, options.seed, _BATCH), prompts)
            rows.append({"variant": name, "step": step, "black": black, "right": right})
            drawn = f"{100 * black:.0f} % of shapes in its colour, {100 * right:.0f} % right"
            print(f"{name:>8} {step:>6}: {drawn}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps({"images": options.images, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
