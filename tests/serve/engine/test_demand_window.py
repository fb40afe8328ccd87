"""The sliding window of offered load."""

import pytest

from serve.engine.demand_window import DemandWindow, OfferedRequest


def test_demand_is_what_was_wanted_lately_refused_or_not():
    window = DemandWindow(10.0)
    for now, refused in ((0.0, True), (5.0, False), (9.0, True)):
        window.add(OfferedRequest(now, None, 1024, 20, 1, refused))
    assert window.load(9.0, lambda wanted: 2.0) == pytest.approx(0.6)
    assert window.refused(9.0, lambda wanted: wanted.calls / 10) == pytest.approx(4.0)
    assert window.load(11.0, lambda wanted: 2.0) == pytest.approx(0.4)
    assert window.load(100.0, lambda wanted: 2.0) == window.refused(100.0, lambda wanted: 2.0) == 0
