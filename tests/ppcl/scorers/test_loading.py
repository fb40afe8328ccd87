"""Scorers are found by name, made with their arguments, and what they give is checked."""

import numpy as np
import pytest

from ppcl.errors import UserError
from ppcl.scorers import BUILT_IN, checked_scores, load_scorer

IMAGES = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (0, 51, 255)])
PROMPTS = ["black", "grey", "white"]
METADATA = [{"category": "shade", "teacher": image} for image in IMAGES]
HERE = __name__


def brightness(prompts, images, metadata, scale=1.0):
    return images.mean(axis=(1, 2, 3)) / 255 * scale


def is_white(prompts, images, metadata):
    return [bool((image == 255).all()) for image in images]


class Counting:
    made = 0

    def __init__(self, start, device="nowhere"):
        type(self).made += 1
        self.start, self.device = start, device

    def __call__(self, prompts, images, metadata):
        self.start += len(prompts)
        return [self.start] * len(prompts)


def score(call, arguments=None, prompts=PROMPTS):
    scorer = load_scorer("mine", call, arguments or {}, "cpu")
    return checked_scores("mine", scorer, prompts, IMAGES, METADATA).tolist()


def test_a_function_gets_the_images_and_its_arguments():
    assert score(f"{HERE}:brightness", {"scale": 10}) == pytest.approx([0, 2, 10])


def test_true_and_false_are_1_and_0():
    assert score(f"{HERE}:is_white") == [0, 0, 1]


def test_a_class_is_made_once_and_told_the_device():
    scorer = load_scorer("mine", f"{HERE}:Counting", {"start": 5}, "cpu")
    assert scorer.device == "cpu" and Counting.made == 1
    for expected in (8, 11):
        assert checked_scores("mine", scorer, PROMPTS, IMAGES, METADATA).tolist() == [expected] * 3
    assert Counting.made == 1


def test_similarity_to_the_teacher_is_built_in():
    assert score("ssim") == pytest.approx([1, 1, 1])
    assert score("psnr") == pytest.approx([58.9, 58.9, 58.9], abs=0.1)


def test_every_built_in_name_leads_somewhere():
    for name, place in BUILT_IN.items():
        module, _, attribute = place.partition(":")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute)), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("clip_scores", "evaluation.scorers.mine.call is 'clip_scores'.*the nearest is clip_score"),
        ("no_such_module_x:f", "the module no_such_module_x cannot be imported"),
        (f"{HERE}:nothing", "has no nothing; correct the name"),
        (f"{HERE}:PROMPTS", "is a list; name a function or a class"),
    ],
)
def test_a_call_that_names_no_scorer_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        score(call)


@pytest.mark.parametrize("call", ["brightness", "Counting"])
def test_arguments_that_it_does_not_take_are_refused(call):
    with pytest.raises(UserError, match=r"evaluation.scorers.mine.arguments: .*'colour': 1.*unexpected|missing"):
        score(f"{HERE}:{call}", {"colour": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, float("nan"), 2.0], "gave nan for the image of 'grey'"),
        ([1.0, 2.0], "gave 2 scores for 3 images"),
        (None, "gave None; it must give one number"),
        (["a", "b", "c"], "it must give one number, or true or false, an image"),
    ],
)
def test_what_is_no_score_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        checked_scores("mine", lambda *_: given, PROMPTS, IMAGES, METADATA)


def test_a_scorer_that_raises_is_named_with_its_error():
    def broken(*_):
        raise ZeroDivisionError("division by zero")

    with pytest.raises(UserError, match=r"evaluation.scorers.mine raised ZeroDivisionError: division by zero; mend it"):
        checked_scores("mine", broken, PROMPTS, IMAGES, METADATA)
