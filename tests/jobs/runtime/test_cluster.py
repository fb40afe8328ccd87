"""The embedded Ray of `ppcl compress`, which nobody but its own processes can use, and addresses of other ones."""

import os
import re
import subprocess
import sys

import pytest

from jobs.runtime.cluster import _connect
from ppcl.errors import UserError
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


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("somewhere", "--address 'somewhere' is not an address; give host:port or auto"),
        ("head:gcs", "--address 'head:gcs' is not an address; give host:port or auto"),
        (
            "ray://127.0.0.1:10001",
            "--address 'ray://127.0.0.1:10001' is that of a Ray Client, which cannot run a job; give host:port of the "
            "GCS, as HEAD:6379",
        ),
    ],
)
def test_what_is_no_address_of_a_cluster_is_told(address, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        _connect(address)
