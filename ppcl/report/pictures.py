"""The image grid: the teacher's and every variant's image of the same prompts and seeds, as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ppcl.search.variants import TEACHER
from ppcl.storage.results import Results

ROWS = 8
LARGEST = 384  # pixels: larger images are shown smaller, or the page of a 1024² model would weigh 60 MB
PIXELATED = 128  # pixels: smaller ones are enlarged without smoothing


def picture_rows(results: Results, names: list[str]) -> list[dict[str, Any]]:
    """Up to `ROWS` prompts: the first of each category, then the second of each, and so on.

    Each row holds `prompt`, `category` and `pictures`; an image holds `variant`, `source` (`None` where the file is
    not there), `alt`, `right` (`None` without a checker) and `pixelated`.
    """
    evaluation = results.stage("evaluation")
    prompts, right = evaluation.get("prompts", []), evaluation.get("right", {})
    folder = results.root / "evaluation" / "pictures"
    rows = []
    for index in _chosen([prompt.get("category") for prompt in prompts]):
        pictures = []
        for name in names:
            verdict = right[name][index] if index < len(right.get(name, [])) else None
            source, pixelated = _data_url(folder, folder / name / f"{index:04d}.png")
            said = "" if verdict is None else ", found right" if verdict else ", found wrong"
            maker = "the teacher" if name == TEACHER else name
            pictures.append(
                {
                    "variant": name,
                    "source": source,
                    "pixelated": pixelated,
                    "right": verdict,
                    "alt": f"“{prompts[index]['text']}” by {maker}{said}",
                }
            )
        if any(picture["source"] for picture in pictures):
            rows.append(
                {"prompt": prompts[index]["text"], "category": prompts[index].get("category"), "pictures": pictures}
            )
    return rows


def drawn_size(results: Results) -> dict[str, int]:
    """`width` and `height` of the teacher's images, which a pipeline may have rounded; empty where there are none."""
    for path in sorted((results.root / "evaluation" / "pictures" / TEACHER).glob("*.png")):
        try:
            with Image.open(path) as image:
                return {"width": image.width, "height": image.height}
        except (OSError, UnidentifiedImageError):
            continue
    return {}


def chosen_prompts(results: Results) -> list[int]:
    """The numbers of the prompts that pictures are shown of."""
    return _chosen([prompt.get("category") for prompt in results.stage("evaluation").get("prompts", [])])


def _chosen(categories: list[str | None]) -> list[int]:
    """Indices of the prompts shown, in order of their category and then of the prompt file."""
    seen: dict[str | None, int] = {}
    ranked = []
    for index, category in enumerate(categories):
        seen[category] = seen.get(category, -1) + 1
        ranked.append((seen[category], index))
    order = list(seen)
    return sorted((index for _, index in sorted(ranked)[:ROWS]), key=lambda i: (order.index(categories[i]), i))


def _data_url(folder: Path, path: Path) -> tuple[str | None, bool]:
    """The image as a data URL, and whether it is small; `None` where it is no image inside `folder`."""
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, False
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None, False
    pixelated = max(picture.size) < PIXELATED
    buffer = io.BytesIO()
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixelated
