"""Folded modulations: exact on the basis' own span, close on the whole curve, and in every kind of entry."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ppcl.models import adapter_of
from ppcl.replacements import LinearFfn, LowRankModulation, TextRun
from ppcl.replacements.assembly import block_map
from ppcl.replacements.linear_ffn import LinearFfnMaps
from ppcl.replacements.low_rank_modulation import InBasis, ModulationBasis, fit_basis
from ppcl.replacements.text_projectors import TextProjectors
from tests import tiny
from tests.ppcl.replacements.test_modulation import MODELS, WIDTH, randomised
from tests.samples import MemorySamples


class Samples:
    """Inputs of a tiny model, the same whatever ids are asked for."""

    def __init__(self, model):
        self.model = model

    def batch(self, ids, device="cpu", dtype=torch.float32):
        return tiny.inputs(self.model, batch=len(ids))


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_a_folded_map_is_the_map_of_what_the_basis_keeps():
    torch.manual_seed(0)
    linear, basis, x = nn.Linear(8, 5), ModulationBasis(8, 3), torch.randn(7, 8)
    directions, _ = torch.linalg.qr(torch.randn(8, 3))
    basis.directions.copy_(directions)
    basis.mean.copy_(torch.randn(8))
    kept = basis.mean + (x - basis.mean) @ directions @ directions.T
    assert torch.allclose(InBasis(basis.restricted(linear), basis)(x), linear(kept), atol=1e-5)


@torch.no_grad()
def test_the_rank_is_the_least_that_keeps_the_curve():
    """Against the singular values of Qwen-Image's own embedder, called by hand."""
    model, samples = tiny.qwen_transformer(), MemorySamples()
    basis = fit_basis(model, samples, samples.ids("train"), 16, 1e-3)
    times = torch.linspace(0, 1, 2048)
    s = F.silu(model.time_text_embed(times, torch.zeros(1))).double()
    values = np.linalg.svd((s - s.mean(0)).numpy(), compute_uv=False) ** 2
    left = 1 - np.cumsum(values) / values.sum()
    rank = basis.directions.shape[1]
    assert left[rank - 1] <= 1e-3 < left[rank - 2]
    assert torch.allclose(basis.directions.T @ basis.directions, torch.eye(rank), atol=1e-5)
    wrong = s - (basis.mean + basis.coordinates(s.float()) @ basis.directions.T)
    assert float(wrong.square().sum() / (s - s.mean(0)).square().sum()) == pytest.approx(left[rank - 1], rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("others", [(), (LinearFfn(1),), (TextRun(0, 1), LinearFfn(1))])
def test_a_basis_of_all_directions_changes_nothing(model, others, training):
    model.requires_grad_(training)
    adapter = adapter_of(model)
    blocks = list(adapter.blocks(model))
    parts = adapter.parts_of(model, 1, blocks[1])
    modules = {
        LinearFfn(1): randomised(LinearFfnMaps.new(parts, WIDTH)),
        TextRun(0, 1): randomised(TextProjectors(TextRun(0, 1), WIDTH, True)),
        LowRankModulation(): fit_basis(model, Samples(model), np.arange(4), 64, 1e-30),
    }
    # The curve of a tiny embedder has fewer directions than the width; what it never does may be lost.
    assert modules[LowRankModulation()].directions.shape == (WIDTH, WIDTH)

    def velocity(plan):
        for number, module in block_map(adapter, model, blocks, modules, plan).items():
            where, index = adapter.entry(model, number)
            where._modules[str(index)] = module
        made = model(**tiny.inputs(model), return_dict=False)[0]
        for number, block in enumerate(blocks):
            where, index = adapter.entry(model, number)
            where._modules[str(index)] = block
        return made

    plain, folded = velocity(others), velocity((*others, LowRankModulation()))
    assert torch.allclose(plain, folded, atol=2e-4 * float(plain.abs().max())) and not torch.equal(plain, folded)


def test_a_modulation_in_training_is_followed_and_gets_its_gradient():
    torch.manual_seed(0)
    block, basis, x = nn.Sequential(nn.Linear(8, 12)), ModulationBasis(8, 3), torch.randn(5, 8)
    with torch.no_grad():
        basis.directions.copy_(torch.linalg.qr(torch.randn(8, 3))[0])
        basis.mean.copy_(torch.randn(8))
    view = basis.folded(block, ["0"])
    with torch.enable_grad():
        view(x).square().sum().backward()
    assert block[0].weight.grad.abs().max() > 0
    with torch.no_grad():
        block[0].weight.add_(torch.randn(12, 8))
    block.requires_grad_(False)
    assert torch.allclose(view(x), basis.folded(block, ["0"])(x), atol=1e-5)
    assert isinstance(basis.folded(block, ["0"])[0], InBasis)
