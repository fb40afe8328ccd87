"""The embedded Ray of `ppcl compress`: nobody but its own processes can use it."""

import os
import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.listening import nobody_else_gets_in

_HOLD = """
import sys
from jobs.runtime.cluster import connected
from ppcl.config.schema import Config
with connected(None, Config(teacher="t", prompts="p", device="cpu")):
    import ray
    ray.get(ray.remote(lambda: None).remote())
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_nobody_else_reaches_the_embedded_ray_even_where_the_environment_turns_tokens_off():
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        nobody_else_gets_in(process.pid)
    finally:
        process.stdin.close()
        assert process.wait(60) == 0
