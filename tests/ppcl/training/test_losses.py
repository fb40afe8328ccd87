"""The losses of training, against their formulas."""

import numpy as np
import torch
from torch.nn import functional as F

from ppcl.training.losses import normalized, relative


def test_losses_against_their_formulas():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    total, tokens = normalized(s, t, mask)
    by_hand = [((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(s[mask], t[mask])]
    assert tokens == 8 and torch.isclose(total, torch.stack(by_hand).sum())
    # Eq. 6's squared distance of unit vectors is 2 - 2 cos.
    assert torch.isclose(total, (2 - 2 * F.cosine_similarity(s, t, dim=-1))[mask].sum())
    total, energy = relative(s, t)
    assert np.isclose(float(total) / energy, float((s - t).square().sum() / t.square().sum()))
