"""Weights come when a module runs and go when others need the room; what is computed stays the same."""

import pytest
import torch
from torch import nn

from ppcl.models.weight_cache import WeightCache, host_original, tensor_bytes

WIDTH = 16
LAYER = 4 * (WIDTH * WIDTH + WIDTH)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))).requires_grad_(False)


def attached(layers, limit, following=lambda module: None):
    cache = WeightCache("cpu", limit, following)
    for layer in layers:
        cache.attach(layer)
    return cache


def test_the_same_bits_come_out_and_the_limit_holds(layers):
    x = torch.randn(3, WIDTH)
    before, places = layers(x), [layer.weight.data_ptr() for layer in layers]
    cache = attached(layers, 2 * LAYER)
    assert torch.equal(layers(x), before)
    assert cache.most_held == cache.held == 2 * LAYER and cache.copied == 5 * LAYER
    assert [cache.holds(layer.weight) for layer in layers] == [False] * 3 + [True] * 2
    assert layers[4].weight.data_ptr() != places[4] == host_original(layers[4].weight).data_ptr()
    cache.clear()
    assert cache.held == 0 and [layer.weight.data_ptr() for layer in layers] == places


def test_what_was_used_last_stays(layers):
    x = torch.randn(3, WIDTH)
    cache = attached(layers, 2 * LAYER)
    for number in (0, 1, 0, 2, 0):
        layers[number](x)
    assert cache.copied == 3 * LAYER and cache.holds(layers[0].weight) and not cache.holds(layers[1].weight)


def test_the_next_module_comes_while_one_computes_and_is_not_copied_twice(layers):
    following = dict(zip(layers, list(layers)[1:]))
    cache = attached(layers, 2 * LAYER, following.get)
    layers[0](torch.randn(3, WIDTH))
    assert cache.holds(layers[1].weight) and cache.held == 2 * LAYER
    layers(torch.randn(3, WIDTH))
    assert cache.copied == 5 * LAYER and cache.most_held == 2 * LAYER


def test_a_module_that_others_run_in_keeps_its_own_weights_meanwhile(layers):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.scale = layers, nn.Parameter(torch.full((WIDTH,), 2.0), requires_grad=False)

        def forward(self, x):
            y = self.layers(x)
            assert cache.holds(self.scale)
            return y * self.scale

    outer, x = Outer(), torch.randn(3, WIDTH)
    before = layers(x) * 2
    cache = attached([*layers, outer], LAYER + 4 * WIDTH)
    assert torch.equal(outer(x), before) and cache.most_held == LAYER + 4 * WIDTH


def test_weights_that_two_modules_share_are_there_once(layers):
    layers[1].weight = layers[0].weight
    cache = attached(layers, 10 * LAYER)
    layers(torch.randn(3, WIDTH))
    assert cache.held == tensor_bytes(layers) == 5 * LAYER - 4 * WIDTH * WIDTH


def test_an_error_in_a_module_leaves_the_cache_as_it_should_be(layers):
    x = torch.randn(3, WIDTH)
    cache = attached(layers, LAYER)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            layers[0](torch.randn(3, WIDTH + 1))
    assert cache.held == LAYER
    layers[1](x)
    assert cache.held == LAYER and not cache.holds(layers[0].weight)


def test_what_is_forgotten_is_back_on_the_host(layers):
    cache = attached(layers, 10 * LAYER)
    layers(torch.randn(3, WIDTH))
    cache.forget(layers[2])
    assert cache.held == 4 * LAYER and host_original(layers[2].weight) is layers[2].weight
