"""Bytes of tensors alive at once, against those that are known."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.sizing.peak_memory import PeakMemory

MEGABYTE = 1 << 20


def _make_and_drop():
    with PeakMemory() as memory:
        kept = torch.zeros(MEGABYTE, dtype=torch.uint8)
        gone = kept + kept
        del gone
        view = kept.view(-1, 2)  # no bytes of its own
        half = view[:, 0] + 1
    return memory, kept, half


def test_what_is_freed_counts_for_the_peak_and_not_for_what_is_left():
    memory, *_ = _make_and_drop()
    assert (memory.peak, memory.now) == (2 * MEGABYTE, 1.5 * MEGABYTE)


def test_fake_tensors_count_as_real_ones():
    with FakeTensorMode():
        memory, *_ = _make_and_drop()
    assert (memory.peak, memory.now) == (2 * MEGABYTE, 1.5 * MEGABYTE)


def test_what_was_there_counts_once_it_is_held_and_each_storage_once():
    linear = nn.Linear(256, 1024)
    size = sum(p.nbytes for p in linear.parameters())
    with PeakMemory() as memory:
        memory.hold(linear, [linear.weight], {"tied": linear.weight.T})
        assert memory.now == size
        memory.restart()
        loss = linear(torch.zeros(2, 256)).sum()
        loss.backward()
    assert memory.now == 2 * size + loss.nbytes


def test_a_storage_that_is_resized_counts_with_its_new_size():
    with PeakMemory() as memory:
        gathered = torch.zeros(MEGABYTE, dtype=torch.uint8)
        gathered.untyped_storage().resize_(0)
        assert memory.now == 0
        gathered.untyped_storage().resize_(2 * MEGABYTE)
        assert memory.now == memory.peak == 2 * MEGABYTE
