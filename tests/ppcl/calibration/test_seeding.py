import numpy as np
import pytest

from ppcl.calibration.seeding import chosen_steps, hashes, held_out, strata


def test_every_stratum_has_one_position():
    for prompt in range(50):
        assert (np.floor(strata(3, prompt, 4) * 4) == [0, 1, 2, 3]).all()


@pytest.mark.parametrize("count, steps", [(1, 20), (3, 20), (4, 20), (7, 9)])
def test_steps_of_a_prompt_differ_and_all_steps_are_covered_evenly(count, steps):
    chosen = [chosen_steps(0, prompt, count, steps) for prompt in range(1000)]
    assert all(len(set(c)) == count and sorted(c) == c for c in chosen)
    times = np.bincount(np.concatenate(chosen), minlength=steps)
    assert len(times) == steps
    assert np.abs(times / (1000 * count / steps) - 1).max() < 0.1


def test_more_states_than_steps_are_all_steps():
    assert chosen_steps(0, 5, 9, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("count, share, expected", [(40, 0.25, 10), (2, 0.01, 1), (2, 0.99, 1), (10, 0.96, 9)])
def test_the_held_out_share_is_exact_and_leaves_both_sides_something(count, share, expected):
    texts = [f"prompt {i}" for i in range(count)]
    chosen = held_out(hashes(texts, 0), share).tolist()
    assert len(chosen) == expected == len(set(chosen))
    assert held_out(hashes(texts, 0), share).tolist() == chosen
    if count == 40:
        assert held_out(hashes(texts, 1), share).tolist() != chosen


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("texts", [["a", "b", "b", "b"], ["a"] * 5 + ["b"], ["a", "b", "a", "c", "b"]])
def test_a_prompt_written_twice_is_on_one_side(seed, texts):
    for share in (0.1, 0.5, 0.9):
        out = set(held_out(hashes(texts, seed), share).tolist())
        inside = {texts[i] for i in out}
        assert inside and inside != set(texts)
        assert inside.isdisjoint(texts[i] for i in range(len(texts)) if i not in out)
