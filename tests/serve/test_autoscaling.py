"""The autoscaling policy on numbers alone."""

import pytest

from serve.autoscaling import BACKLOG, BacklogPolicy


class Context:
    """What Ray Serve hands a policy."""

    def __init__(self, backlogs, target=3):
        self.target_num_replicas = target
        self.aggregated_metrics = {BACKLOG: dict(enumerate(backlogs))} if backlogs else {}


@pytest.mark.parametrize(("backlogs", "wanted"), [([25.0, 10.0], 3.5), ([0.0, 0.0], 0), ([], 3), ([10.0], 1)])
def test_the_policy_wants_as_many_replicas_as_keep_the_backlog_at_its_target(backlogs, wanted):
    assert BacklogPolicy(target_seconds=10)(Context(backlogs)) == (wanted, {})
