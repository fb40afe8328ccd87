"""Texts that an image shows are read by a real recogniser."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ppcl.errors import UserError
from ppcl.scorers.ocr import OcrAccuracy, letters, matched_letters, quoted_texts


def picture(*lines):
    image = Image.new("RGB", (512, 256), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((30, 40 + 80 * number), line, fill="black", font=ImageFont.load_default(48))
    return np.asarray(image)


@pytest.fixture(scope="module")
def ocr():
    return OcrAccuracy()


def test_the_share_of_letters_that_are_read_is_the_score(ocr):
    prompts = ['a sign that says "OPEN 24 HOURS"', "a menu: “Coffee” and “Milk”", 'a poster that reads "CLOSED"']
    images = np.stack([picture("Open 24 hours"), picture("COFFEE"), picture()])
    scores = ocr(prompts, images, [{}] * 3)
    # Of ten letters of the second, six are there.
    assert scores == pytest.approx([1, 6 / 10, 0])


def test_a_prompt_that_quotes_nothing_is_refused(ocr):
    with pytest.raises(UserError, match="the prompt 'a cat' quotes no text"):
        ocr(["a cat"], np.stack([picture()]), [{}])


def test_quotes_of_several_scripts_are_found_and_apostrophes_are_none():
    assert quoted_texts("it's 'fine': \"One, two\" and «trois» and 「四」 and “”") == ["onetwo", "trois", "四"]
    assert letters("Ｃａｆé — No. 5!") == "caféno5"


@pytest.mark.parametrize(
    ("wanted", "found", "count"),
    [("open", "weareopennow", 4), ("open", "oqen", 3), ("open", "", 0), ("abc", "cba", 1), ("hello", "he", 2)],
)
def test_the_best_stretch_counts(wanted, found, count):
    assert matched_letters(wanted, found) == count
