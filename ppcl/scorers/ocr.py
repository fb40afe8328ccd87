"""How well an image shows the texts that its prompt quotes, read by RapidOCR (`ppcl[scorers]`), models included."""

from __future__ import annotations

import logging
import re
import unicodedata
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from ppcl.errors import UserError

# Straight and typographic double quotes, and those of Chinese and Japanese. Single ones are apostrophes too often.
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」|『([^』]+)』|«([^»]+)»')


class OcrAccuracy:
    """1 for every quoted text that is read letter by letter, less by the share of letters that are not.

    Of a prompt with several quoted texts, the mean weighted by their letters. Case, spaces and punctuation do not
    count. The order in which the lines are read does not, either: each text is looked for in all of what was read.
    Every prompt must quote a text: give a suite of its own, such as LongText-Bench, to this scorer.
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        self.read: Any = RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        return [self._score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def _score(self, prompt: str, image: np.ndarray) -> float:
        wanted = quoted_texts(prompt)
        if not wanted:
            raise UserError(f'the prompt {prompt!r} quotes no text; ocr needs prompts such as: a sign that says "OPEN"')
        # It takes images as OpenCV has them, blue first.
        found = letters(" ".join(self.read(np.ascontiguousarray(image[:, :, ::-1])).txts or ()))
        return sum(matched_letters(text, found) for text in wanted) / sum(map(len, wanted))


def quoted_texts(prompt: str) -> list[str]:
    """The letters of the texts that a prompt quotes, without those that have none."""
    texts = (letters(next(filter(None, match.groups()))) for match in _QUOTED.finditer(prompt))
    return [text for text in texts if text]


def letters(text: str) -> str:
    """Letters and digits alone, in lower case and compatible form."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def matched_letters(wanted: str, found: str) -> int:
    """How many letters of `wanted` are in the stretch of `found` that matches it best, in order.

    At most `O(|wanted|² |found|)`: both are short.
    """
    if wanted in found:
        return len(wanted)
    best = 0
    # A stretch of the same length from every place where it could begin.
    for start in range(max(1, len(found) - len(wanted) + 1)):
        matcher = SequenceMatcher(None, wanted, found[start : start + len(wanted)], autojunk=False)
        best = max(best, sum(block.size for block in matcher.get_matching_blocks()))
    return best
