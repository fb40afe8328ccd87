"""Try a LoRA of the demo teacher on every variant of a result: how many shapes are black, and how many images right.

    python -m ppcl.demo.score_lora runs/demo demo/loras/ink.safetensors

The captions are held out of the teacher's and the LoRA's training. With the LoRA an image is right if it shows what the
caption says but for the colours.
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
        row: dict[str, Any] = {"variant": name}
        for key, lora in (("without", None), ("with", options.lora)):
            result.switch(pipeline, name, lora)
            row[key] = measures(draw(pipeline, prompts, options.sampling_steps, options.seed, _BATCH), prompts)
        row["share_on"] = result.coverage(pipeline, name, options.lora).share
        rows.append(row)
        before, after = row["without"][0], row["with"][0]
        print(
            f"{name:>8}: {100 * row['share_on']:5.1f} % of the LoRA on; shapes in {COLOUR}: {100 * before:.0f} % "
            f"without it, {100 * after:.0f} % with it; right but for colours: {100 * row['with'][1]:.0f} %",
            flush=True,
        )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"images": options.images, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
