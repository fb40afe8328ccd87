"""Waiting for what a real server does."""

import time

# Generous: a busy machine starts Ray and a replica in a minute or two.
PATIENCE = 240.0


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.1)
    return result
