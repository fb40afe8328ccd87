"""The world's checker: right on what the world draws, and not fooled by any single thing that is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from ppcl.demo import world
from ppcl.errors import UserError
from ppcl.evaluation.prompt_checker import checker_prompts, correctness, load_checker, named_prompts

SCENES = 60


def scenes(category, seed=0):
    rng = np.random.default_rng(seed)
    captions = [c.text for c in world.captions() if c.category == category]
    for _ in range(SCENES):
        text = captions[rng.integers(len(captions))]
        yield text, world.scene(text, rng), rng


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_ground_truth_passes(category):
    right = [world.check(world.render(things), text) for text, things, _ in scenes(category)]
    assert np.mean(right) >= 0.99


def other(values, value, rng):
    rest = [v for v in values if v != value]
    return rest[rng.integers(len(rest))]


def free_cell(things):
    taken = {(t.x, t.y) for t in things}
    return next((x, y) for x in range(8, 64, 16) for y in range(8, 64, 16) if (x, y) not in taken)


def wrong_shape(things, rng):
    return [replace(things[0], shape=other(world.SHAPES, things[0].shape, rng)), *things[1:]]


def wrong_colour(things, rng):
    return [replace(things[0], colour=other(list(world.PALETTE), things[0].colour, rng)), *things[1:]]


def one_more(things, rng):
    x, y = free_cell(things)
    return [*things, replace(things[0], x=x, y=y)]


def one_less(things, rng):
    return things[1:]


def places_swapped(things, rng):
    a, b = things
    return [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]


def colours_swapped(things, rng):
    a, b = things
    return [replace(a, colour=b.colour), replace(b, colour=a.colour)]


@pytest.mark.parametrize(
    ("category", "spoil"),
    [(c, s) for c in world.CATEGORIES for s in (wrong_shape, one_more, one_less)]
    + [(c, wrong_colour) for c in ("colors", "counting", "color_attr", "position", "two_object")]
    + [("position", places_swapped), ("color_attr", colours_swapped)],
)
def test_one_wrong_thing_fails(category, spoil):
    fooled = [text for text, things, rng in scenes(category) if world.check(world.render(spoil(things, rng)), text)]
    assert not fooled


def test_an_empty_canvas_and_noise_fail():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not world.check(world.render([]), "a photo of a circle") and not world.check(noise, "a photo of a circle")


def test_held_out_captions_are_asked_equally_and_the_trained_ones_never():
    prompts = checker_prompts(world, 60, seed=0)
    held_out = {c.text for c in world.captions() if c.held_out}
    assert [sum(p.category == c for p in prompts) for c in world.CATEGORIES] == [10] * 6
    assert all(p.text in held_out for p in prompts if p.category != "single_object")
    assert checker_prompts(world, 60, seed=0) == prompts != checker_prompts(world, 60, seed=1)


def test_captions_that_things_were_fitted_or_chosen_on_come_last():
    captions = [c for c in world.captions() if c.category == "colors" and c.held_out]
    seen = {captions[0].text, "a photo of a circle", "a photo of a cross"}
    few = [p.text for p in checker_prompts(world, 6 * (len(captions) - 1), seed=0, seen=seen)]
    assert seen.isdisjoint(few)
    many = [p.text for p in checker_prompts(world, 6 * len(captions), seed=0, seen=seen)]
    assert len(captions) == 3 and captions[0].text in many, "no other caption of its category is left"


def test_passes_by_category():
    prompts = named_prompts(
        load_checker("shapes"), ["a photo of a circle", "a photo of a red circle", "a photo of a blue circle"]
    )
    red = world.render([world.Thing("circle", "red", 8, 8, 6)])
    found = correctness(world, np.stack([red] * 3), prompts)
    assert {c: p.tolist() for c, p in found.items()} == {"single_object": [1.0], "colors": [1.0, 0.0]}
    with pytest.raises(UserError, match="'a cat' is not a caption that the checker knows"):
        named_prompts(world, ["a cat"])
