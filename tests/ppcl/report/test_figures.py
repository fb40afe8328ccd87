"""The report's figures."""

from ppcl.report import figures


def test_heat_map_outline_encloses_exactly_the_interval_on_and_above_the_diagonal():
    from matplotlib.path import Path

    outline = Path(figures._staircase(4, 7))
    inside = {(u, k) for u in range(12) for k in range(12) if outline.contains_point((k, u))}
    assert inside == {(u, k) for u in range(4, 8) for k in range(u, 8)}


def test_series_are_told_apart_by_more_than_hue():
    names = [f"v{i}" for i in range(20)]
    looks = figures.series_of(["teacher", *names])
    assert len({(look.role, look.dash) for look in looks.values()}) == 21
