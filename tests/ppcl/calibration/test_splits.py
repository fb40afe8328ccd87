"""Train, validation and test: disjoint, by text, seeded, and almost the same where more prompts come."""

import numpy as np
import pytest

from ppcl.calibration.splits import hashes, split_prompts


def split_texts(texts, validation=0.125, test=0.125, seed=0):
    """The texts of each split."""
    splits = split_prompts(hashes(texts, seed), validation, test)
    return {split: [texts[i] for i in rows] for split, rows in splits.items()}


def numbered(count):
    return [f"prompt {i}" for i in range(count)]


@pytest.mark.parametrize(
    "count, validation, test, sizes",
    [
        (40, 0.25, 0.125, (25, 10, 5)),
        (3, 0.01, 0.01, (1, 1, 1)),
        (3, 0.98, 0.01, (1, 1, 1)),
        (3, 0.01, 0.98, (1, 1, 1)),
        (10, 0.49, 0.49, (1, 5, 4)),
    ],
)
def test_shares_are_exact_and_leave_every_split_something(count, validation, test, sizes):
    splits = split_prompts(hashes(numbered(count), 0), validation, test)
    assert tuple(len(splits[split]) for split in ("train", "validation", "test")) == sizes
    assert np.sort(np.concatenate(list(splits.values()))).tolist() == list(range(count))
    assert all((np.diff(rows) > 0).all() for rows in splits.values())


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_prompts():
    texts = numbered(40)
    by_text = {split: sorted(part) for split, part in split_texts(texts).items()}
    assert {split: sorted(part) for split, part in split_texts(texts[::-1]).items()} == by_text
    assert {split: sorted(part) for split, part in split_texts(texts, seed=1).items()} != by_text


def test_almost_all_prompts_stay_in_their_split_where_more_come():
    few, many = split_texts(numbered(4000)), split_texts(numbered(8000))
    for split, texts in few.items():
        assert len(set(texts) & set(many[split])) > 0.93 * len(texts), split


def test_neither_share_moves_the_prompts_of_the_other_split():
    texts = numbered(200)
    assert split_texts(texts, test=0.3)["validation"] == split_texts(texts)["validation"]
    assert split_texts(texts, validation=0.3)["test"] == split_texts(texts)["test"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "texts", [["a", "b", "c", "c", "c", "c"], ["a"] * 5 + ["b", "c"], ["a", "b", "a", "c", "b", "d"]]
)
def test_a_prompt_written_twice_is_in_one_split(seed, texts):
    for share in (0.1, 0.3, 0.49):
        parts = [set(part) for part in split_texts(texts, share, share, seed).values()]
        assert all(parts) and sum(map(len, parts)) == len(set(texts)) == len(set.union(*parts))
