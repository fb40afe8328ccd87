"""Which hidden units stay: against greedy elimination by plain least squares, and against one unit at a time."""

import numpy as np
import pytest
import torch

from ppcl.linalg import FittedMap, Moments, eliminate_groups, eliminate_units


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before():
    torch.manual_seed(0)


def counted(tokens, pieces=1):
    whole = Moments(tokens.shape[1], 0)
    for piece in tokens.tensor_split(pieces):
        part = Moments(tokens.shape[1], 0)
        part.update(piece, piece[:, :0])
        whole.merge(part)
    return whole


def hidden_units(n=400, h=9, seed=0):
    """Correlated, off-centre, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(h, h, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, h, dtype=torch.float64)
    return torch.randn(n, h, generator=generator, dtype=torch.float64) @ mix + torch.arange(h) * 3.0


def refitted(x, y, units):
    """Least squares of `y` on those units and a constant, by numpy, and its squared error."""
    a = np.concatenate([x[:, units], np.ones((len(x), 1))], 1)
    solution = np.linalg.lstsq(a, y, rcond=None)[0]
    return solution, float(np.square(a @ solution - y).sum())


def test_units_go_one_by_one_as_plain_least_squares_says():
    x = hidden_units()
    w, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    made = eliminate_units(counted(x, pieces=3), w, b, [7, 4, 1], ridge=0.0)
    y = (x @ w.T + b).numpy()
    left = list(range(9))
    while len(left) > 1:
        errors = {unit: refitted(x.numpy(), y, [u for u in left if u != unit])[1] for unit in left}
        left.remove(min(errors, key=errors.get))
        if len(left) in made:
            solution, error = refitted(x.numpy(), y, left)
            pruned = made[len(left)]
            assert pruned.units.tolist() == left
            # Normal equations square the condition of these units: some 3e-6 are lost.
            assert np.allclose(pruned.weight.numpy().T, solution[:-1], atol=1e-5)
            assert np.allclose(pruned.bias.numpy(), solution[-1], atol=1e-5)
            assert pruned.error == pytest.approx(error / np.square(y - y.mean(0)).sum(), rel=1e-5, abs=1e-12)


def test_what_other_units_can_say_goes_first_and_costs_nothing():
    x = hidden_units(h=6)
    # Units 6 and 7 say what others say; unit 8 never changes.
    x = torch.cat([x, x[:, :1] + x[:, 1:2], 2 * x[:, 2:3], torch.full_like(x[:, :1], 5.0)], 1)
    w, b = torch.randn(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    (pruned,) = eliminate_units(counted(x), w, b, [6], ridge=1e-9).values()
    assert pruned.error < 1e-6 and 8 not in pruned.units
    assert torch.allclose(x[:, pruned.units] @ pruned.weight.T + pruned.bias, x @ w.T + b, atol=1e-2)


def test_fewer_tokens_than_units_are_no_obstacle():
    x = hidden_units(n=5)
    w, b = torch.randn(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    (pruned,) = eliminate_units(counted(x), w, b, [5], ridge=1e-6).values()
    assert torch.isfinite(pruned.weight).all()
    # Five tokens lie in four dimensions: four units say them all.
    assert pruned.error < 1e-3


def gelu_units(h, q, seed=0):
    """Units of an FFN on correlated inputs, and a map on them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6 * h, h // 4, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.gelu(inputs @ torch.randn(h // 4, h, generator=generator, dtype=torch.float64) / 4)
    return x, torch.randn(q, h, generator=generator, dtype=torch.float64)


def error_of(x, w, units):
    y = (x @ w.T).numpy()
    return refitted(x.numpy(), y, units)[1] / np.square(y - y.mean(0)).sum()


def one_at_a_time(x, w, widths):
    """The elimination as the formula has it, one rank-1 update after another, in numpy."""
    x = x.numpy() - x.numpy().mean(0)
    inverse, columns = np.linalg.inv(x.T @ x / len(x)), w.numpy().T.copy()
    left, kept = list(range(x.shape[1])), {}
    while len(left) > min(widths):
        costs = np.square(columns).sum(1) / np.diag(inverse)
        unit = int(costs.argmin())
        share = inverse[:, unit] / inverse[unit, unit]
        columns = np.delete(columns - np.outer(share, columns[unit]), unit, 0)
        inverse = np.delete(np.delete(inverse - np.outer(share, inverse[unit]), unit, 0), unit, 1)
        del left[unit]
        if len(left) in widths:
            kept[len(left)] = list(left)
    return kept


def test_groups_lose_hardly_more_than_units_one_at_a_time():
    x, w = gelu_units(384, 48)
    widths = [192, 96, 48]
    made, wanted = eliminate_units(counted(x), w, torch.zeros(48), widths, ridge=0.0), one_at_a_time(x, w, widths)
    for width in widths:
        best, found = error_of(x, w, wanted[width]), error_of(x, w, made[width].units.tolist())
        assert found == pytest.approx(made[width].error, rel=1e-6)
        assert 0.1 < best < 0.9 and found < 1.005 * best


def test_units_that_say_the_same_do_not_leave_together():
    """A whole group would fit into the copies: each of them costs nothing as long as another is there."""
    x, w = gelu_units(128, 16)
    copies = torch.cat([x, x[:, :8] + 1e-4 * torch.randn(len(x), 8, dtype=torch.float64)], 1)
    w = torch.cat([w, 3 * w[:, :8]], 1)
    made = eliminate_units(counted(copies), w, torch.zeros(16), [128], ridge=0.0)
    kept = set(made[128].units.tolist())
    assert all(unit in kept or unit + 128 in kept for unit in range(8)) and made[128].error < 1e-6


def test_all_widths_together_are_those_of_each_alone():
    x, w = gelu_units(96, 12)
    together = eliminate_units(counted(x), w, torch.zeros(12), [60, 30], ridge=1e-4)
    # The groups are cut at the widths that are asked for, so the larger one is the same and the smaller one as good.
    alone = {width: eliminate_units(counted(x), w, torch.zeros(12), [width], ridge=1e-4)[width] for width in (60, 30)}
    assert together[60].units.tolist() == alone[60].units.tolist()
    assert together[30].error == pytest.approx(alone[30].error, rel=1e-2)


def test_a_gram_matrix_without_full_rank_is_no_obstacle():
    """Fewer tokens than units, without any ridge: no diagonal of the inverse may turn negative unseen."""
    x, w = gelu_units(128, 16)
    (pruned,) = eliminate_units(counted(x[:40]), w, torch.zeros(16), [64], ridge=0.0).values()
    assert torch.isfinite(pruned.weight).all() and pruned.error < 1e-3
    y = x[:40] @ w.T
    assert torch.allclose(x[:40][:, pruned.units] @ pruned.weight.T + pruned.bias, y, atol=0.05 * float(y.std()))


def test_progress_is_told_after_every_group_of_units():
    x, w = torch.randn(600, 128), torch.randn(16, 128)
    told = []
    eliminate_units(counted(x), w, torch.zeros(16), [64, 32], 1e-6, told.append)
    assert told == sorted(told) and len(set(told)) == len(told) > 40
    assert told[-1] == pytest.approx(1 - (32 / 128) ** 3)


def attended(maps, groups=5, size=3, n=600):
    """Inputs and outputs of maps on correlated groups, and the maps themselves."""
    made = []
    for number in range(maps):
        x = hidden_units(n=n, h=groups * size, seed=number)
        # The large ones are the last of the first map, and the first of the second.
        x = x.flip(1) if number else x
        generator = torch.Generator().manual_seed(number)
        w = torch.randn(4 + number, groups * size, generator=generator, dtype=torch.float64) * 10.0**number
        made.append((x, w, torch.randn(4 + number, generator=generator, dtype=torch.float64)))
    return made


@pytest.mark.parametrize("maps", [1, 2])
def test_groups_leave_all_maps_together_one_at_a_time_as_plain_least_squares_says(maps):
    size, problems = 3, attended(maps)
    fitted = [FittedMap(counted(x, pieces=3), w, b) for x, w, b in problems]
    told = []
    made = eliminate_groups(fitted, size, [4, 3, 1], ridge=0.0, on_progress=told.append)
    outputs = [(x @ w.T + b).numpy() for x, w, b in problems]

    def inputs(groups):
        return [group * size + i for group in groups for i in range(size)]

    def cost(groups):
        errors = (refitted(x.numpy(), y, inputs(groups))[1] for (x, _, _), y in zip(problems, outputs, strict=True))
        return sum(e / np.square(y - y.mean(0)).sum() for e, y in zip(errors, outputs, strict=True))

    left = list(range(5))
    while len(left) > 1:
        left.remove(min(left, key=lambda group: cost([g for g in left if g != group])))
        if len(left) not in made:
            continue
        pruned = made[len(left)]
        assert pruned.groups.tolist() == left
        for (x, _, _), y, one in zip(problems, outputs, pruned.maps, strict=True):
            solution, error = refitted(x.numpy(), y, inputs(left))
            assert one.units.tolist() == inputs(left)
            scale = np.abs(solution).max()
            assert np.allclose(one.weight.numpy().T, solution[:-1], atol=2e-5 * scale)
            assert np.allclose(one.bias.numpy(), solution[-1], atol=2e-5 * scale)
            assert one.error == pytest.approx(error / np.square(y - y.mean(0)).sum(), rel=1e-5, abs=1e-12)
    assert told == sorted(told) and len(told) == 4


def test_two_maps_agree_on_groups_that_neither_would_choose_alone():
    fitted = [FittedMap(counted(x), w, b) for x, w, b in attended(2)]
    both, first, second = (
        eliminate_groups(some, 3, [3], ridge=0.0)[3].groups.tolist() for some in (fitted, fitted[:1], fitted[1:])
    )
    assert first != second and both not in (first, second)


def test_groups_of_an_input_without_full_rank_are_no_obstacle():
    x, w = gelu_units(128, 16)
    fitted = [FittedMap(counted(x[:40]), w, torch.zeros(16))]
    pruned = eliminate_groups(fitted, 16, [4], ridge=0.0)[4]
    assert torch.isfinite(pruned.maps[0].weight).all() and pruned.maps[0].error < 1e-3


def test_groups_of_one_unit_are_units():
    x, w = gelu_units(60, 12)
    units = eliminate_units(counted(x), w, torch.zeros(12), [59], ridge=1e-4)[59]
    groups = eliminate_groups([FittedMap(counted(x), w, torch.zeros(12))], 1, [59], ridge=1e-4)[59]
    assert groups.groups.tolist() == units.units.tolist()
    assert torch.equal(groups.maps[0].weight, units.weight)
