"""The drain gate: who is admitted, and who is in flight."""

import pytest

from serve.api.drain import DrainGate
from serve.protocol import Refused


def test_requests_in_flight_are_counted_until_they_end_or_fail():
    gate = DrainGate()
    with gate.admit(), gate.admit():
        assert gate.in_flight == 2
    with pytest.raises(ValueError), gate.admit():
        raise ValueError
    assert gate.in_flight == 0


def test_a_closed_gate_refuses_new_requests_and_keeps_counting_old_ones():
    gate = DrainGate()
    with gate.admit():
        gate.open = False
        with pytest.raises(Refused) as refused, gate.admit():
            pytest.fail("it was admitted")
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        assert refused.value.retry_after == 1.0 and gate.in_flight == 1
    assert gate.in_flight == 0
