"""Try a LoRA of the demo teacher on every variant of a result: how many shapes are black, and how many images right.

    python -m ppcl.demo.score_lora runs/demo demo/loras/ink.safetensors

The captions are held out of the teacher's and the LoRA's training. With the LoRA an image is right if it shows what the
caption says but for the colours. Where students can take a part of the LoRA, the images are drawn once more with that.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from ppcl.demo import world
from ppcl.demo.score_teacher import draw
from ppcl.demo.train_lora import COLOUR
from ppcl.result import Result

_BATCH = 48


def without_colours(caption: str) -> str:
    """The same caption with every shape in the LoRA's colour, as the checker is asked."""
    words = caption.split(" ")
    return " ".join(COLOUR if word in world.PALETTE else word for word in words)


def measures(images: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    """The share of shapes that are in the LoRA's colour, and of images that are right but for the colours."""
    shapes = [one for image in images for one in world.look(image)]
    black = sum(one.colour == COLOUR for one in shapes) / max(1, len(shapes))
    right = sum(world.check(image, without_colours(prompt)) for image, prompt in zip(images, prompts, strict=True))
    return black, right / len(prompts)


def _line(row: dict[str, Any]) -> str:
    words = [f"{row['variant']:>8}: {100 * row['share_on']:5.1f} % of the LoRA on; shapes in {COLOUR}, images right"]
    calls = {"without": "without it", "with": "with it", "transferred": "with it on students too"}
    for key, phrase in calls.items():
        if key in row:
            black, right = row[key]
            words.append(f"{phrase} {100 * black:.0f} % and {100 * right:.0f} %")
    return f"{words[0]}: {', '.join(words[1:])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", help="what ppcl compress wrote")
    parser.add_argument("lora", help="the .safetensors file")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="a JSON file to write the figures to")
    options = parser.parse_args()
    result = Result(options.result)
    held_out = [caption.text for caption in world.captions() if caption.held_out]
    prompts = [str(p) for p in np.random.default_rng(options.seed).choice(held_out, options.images, replace=False)]
    pipeline, rows = result.pipeline(), []
    for name in result.variants:
        coverage = result.coverage(pipeline, name, options.lora, lora_transfer=True)
        row: dict[str, Any] = {"variant": name, "share_on": coverage.share}
        calls = {"without": (None, False), "with": (options.lora, False), "transferred": (options.lora, True)}
        for key, (lora, transfer) in calls.items():
            if transfer and not coverage.transferred:
                continue
            result.switch(pipeline, name, lora, transfer)
            row[key] = measures(draw(pipeline, prompts, options.sampling_steps, options.seed, _BATCH), prompts)
        rows.append(row)
        print(_line(row), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"images": options.images, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
