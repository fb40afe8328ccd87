"""Collation alone, on small tensors: which calls share a forward, and how they are joined."""

from types import SimpleNamespace

import pytest
import torch

from serve.engine.batch_collation import Digests, group_of, join

ADAPTER = SimpleNamespace(
    latents="hidden_states",
    timestep="timestep",
    prompt_arguments=("text",),
    shared_arguments=("shapes",),
    text_mask="mask",
)


def call(rows=1, tokens=3, **changes):
    usual = {
        "hidden_states": torch.full((rows, 4, 2), float(tokens)),
        "timestep": torch.ones(rows),
        "text": torch.ones(rows, tokens, 2),
        "mask": None,
        "scale": 1.0,
    }
    return usual | changes


def group(arguments):
    return group_of(ADAPTER, arguments, Digests())


def test_rows_and_lengths_of_texts_do_not_separate_calls():
    assert group(call()) == group(call(rows=2, tokens=5, timestep=torch.tensor([0.1, 0.2])))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": torch.ones(1, 5, 2)},
        {"text": torch.ones(1, 3, 2, dtype=torch.bfloat16)},
        {"scale": 2.0},
        {"scale": True},
        {"fixed": torch.ones(2, 2)},
    ],
    ids=["size", "type of the text", "value", "type of the value", "another argument"],
)
def test_what_must_be_equal_separates_calls(changes):
    assert group(call()) != group(call(**changes))


def test_tensors_that_are_not_rows_are_compared_by_content():
    same = [group(call(fixed=torch.ones(2, 2))) for _ in range(2)]
    assert same[0] == same[1] != group(call(fixed=torch.zeros(2, 2)))


def test_a_value_that_cannot_be_compared_runs_alone():
    value = SimpleNamespace()
    assert group(call(other=value)) != group(call(other=value))


def test_joined_calls_keep_their_rows_in_order_and_shorter_texts_are_masked():
    joined = join(ADAPTER, [call(tokens=2), call(rows=2, tokens=3)])
    assert joined["hidden_states"][:, 0, 0].tolist() == [2.0, 3.0, 3.0]
    assert joined["text"][0].tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert joined["mask"].tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    assert joined["scale"] == 1.0


def test_texts_of_one_length_need_no_mask():
    assert join(ADAPTER, [call(), call()])["mask"] is None


def test_masks_of_calls_are_kept_and_padded():
    joined = join(ADAPTER, [call(tokens=2, mask=torch.tensor([[1, 0]])), call(tokens=3)])
    assert joined["mask"].tolist() == [[True, False, False], [True, True, True]]


def test_lists_with_an_item_per_row_are_joined():
    joined = join(ADAPTER, [call(shapes=[(1, 2)]), call(rows=2, shapes=[(1, 2), (1, 2)])])
    assert joined["shapes"] == [(1, 2)] * 3
