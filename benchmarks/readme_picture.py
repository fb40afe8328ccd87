"""Draw the README's picture: the teacher and the variants of a finished job side by side, with their figures.

    python benchmarks/readme_picture.py runs/demo -o docs/images/variants.png

Rows are prompts of the evaluation, one of each category; columns are the teacher and the variants, from large to small,
with their parameters, speed and score.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")

from matplotlib import pyplot

from ppcl.report import summary_rows
from ppcl.storage.results import read_results

ROWS = 4
CELL = 1.5  # inches
LABEL_WIDTH = 1.2  # inches


def figures(row: dict[str, Any]) -> str:
    """What stands above a column: name, parameters, speed and score, as far as they were measured."""
    lines = [row["variant"]]
    if row["parameters"]:
        share = f" ({100 * row['share']:.0f} %)" if row["share"] else ""
        lines.append(f"{_count(row['parameters'])}{share}")
    if row["speed_up"]:
        lines.append(f"{row['speed_up']:.2f} × speed")
    if row["world"] is not None:
        lines.append(f"{100 * row['world']:.0f} % right")
    elif row["velocity_error"] is not None:
        lines.append(f"error {row['velocity_error']:.2g}")
    return "\n".join(lines)


def _count(parameters: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def chosen_prompts(prompts: list[dict[str, Any]], count: int) -> list[int]:
    """Indices of prompts, the first of each category before the second of any."""
    seen: dict[str | None, int] = {}
    ranked = []
    for index, prompt in enumerate(prompts):
        category = prompt.get("category")
        seen[category] = seen.get(category, -1) + 1
        ranked.append((seen[category], index))
    return [index for _, index in sorted(ranked)[:count]]


def draw(result: Path, output: Path, rows: int = ROWS) -> None:
    """Write the picture. Raises `UserError` where `result` is not a ppcl result."""
    columns = summary_rows(result)
    prompts = read_results(result).stage("evaluation")["prompts"]
    indices = chosen_prompts(prompts, rows)
    size = (LABEL_WIDTH + CELL * len(columns), CELL * (len(indices) + 0.6))
    figure, axes = pyplot.subplots(len(indices), len(columns), figsize=size, squeeze=False)
    for line, index in zip(axes, indices, strict=True):
        for axis, row in zip(line, columns, strict=True):
            image = Image.open(result / "evaluation" / "pictures" / row["variant"] / f"{index:04d}.png")
            axis.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        caption = _wrapped(prompts[index]["text"])
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=7, labelpad=6)
    for axis, row in zip(axes[0], columns, strict=True):
        axis.set_title(figures(row), fontsize=8)
    figure.tight_layout(pad=0.5)
    figure.savefig(output, dpi=150, facecolor="white")
    pyplot.close(figure)


def _wrapped(text: str, width: int = 16) -> str:
    lines = [""]
    for word in text.removeprefix("a photo of ").split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="the folder of a finished job")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/variants.png"))
    parser.add_argument("--rows", type=int, default=ROWS, help="prompts that are shown")
    arguments = parser.parse_args()
    draw(arguments.result, arguments.output, arguments.rows)


if __name__ == "__main__":
    main()
