"""A cluster without workers whose autoscaler adds and removes nodes: Ray's own, over processes of this machine.

`ray.cluster_utils.AutoscalingCluster` would stop every other Ray of the machine, and wants a file that Ray's wheel does
not have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from tests.heads import free_port

# What a file for `ray up` may leave out, and this may not.
_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@contextlib.contextmanager
def autoscaling(idle_minutes=1.0, env=None, **types):
    """A head that does no work, and no nodes; gives the address.

    `types`: by name, the resources of a node and how many of them there may be.
    """
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    port = free_port()
    config = {
        "cluster_name": "test",
        "max_workers": 8,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head}
        | {
            name: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most}
            for name, (resources, most) in types.items()
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "file_mounts": {},
        "docker": {},
        "file_mounts_sync_continuously": False,
    } | dict.fromkeys(_LISTS, [])
    # The path is short since sockets' names must be.
    with tempfile.TemporaryDirectory(prefix="ppcl", ignore_cleanup_errors=True) as folder:
        file, said = Path(folder) / "config.json", Path(folder) / "said"
        file.write_text(json.dumps(config))
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=0",
            "--num-gpus=0",
            f"--port={port}",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
            "--object-store-memory=100000000",
            f"--autoscaling-config={file}",
        ]
        with open(said, "w") as out:
            head = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ
                | (env or {})
                | {
                    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_FAKE_CLUSTER": "1",
                    "RAY_enable_autoscaler_v2": "1",
                    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                },
            )
        try:
            deadline = time.monotonic() + 120
            while "--block" not in said.read_text():
                assert head.poll() is None and time.monotonic() < deadline, said.read_text()
                time.sleep(0.2)
            yield re.search(r"--address='([\d.]+:\d+)'", said.read_text())[1]
        finally:
            _end(head, folder)


def _end(head, folder):
    """End the head and what was started for it: nodes of the autoscaler outlive it.

    The folder tells them from another Ray's.
    """
    head.terminate()
    try:
        head.wait(30)
    except subprocess.TimeoutExpired:
        head.kill()
    left = [
        one for one in psutil.process_iter(["cmdline"]) if any(folder in part for part in one.info["cmdline"] or ())
    ]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=30)
