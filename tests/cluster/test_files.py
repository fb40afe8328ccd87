"""The files for clusters hold together: what one names, another, or the code, has."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import typer
import yaml

from jobs.cli import main as cli
from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
RAY = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)[1]

# What KubeRay 1.7 knows at these places, `ray.io/v1`; an unknown key would be dropped without a word.
KEYS = {
    "RayCluster": {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "authOptions",
        "gcsFaultToleranceOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "RayJob": {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    },
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "container": {"name", "image", "env", "envFrom", "ports", "resources", "volumeMounts", "command"},
}


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def cluster_spec(name):
    (document,) = documents(name)
    assert (
        document["apiVersion"] == "ray.io/v1"
        and document["metadata"]["name"]
        and set(document["spec"]) <= KEYS[document["kind"]]
    )
    return document["spec"].get("rayClusterSpec", document["spec"])


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_a_cluster_for_compression_survives_its_head_asks_for_a_token_and_grows(name):
    spec = cluster_spec(name)
    assert set(spec) <= KEYS["RayCluster"] and spec["rayVersion"] == RAY
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    service, redis = documents("redis.yaml")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == address
    (server,) = redis["spec"]["template"]["spec"]["containers"]
    secret = server["env"][0]["valueFrom"]["secretKeyRef"]
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()

    (workers,) = spec["workerGroupSpecs"]
    assert set(workers) <= KEYS["group"] and workers["minReplicas"] < workers["maxReplicas"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert set(container) <= KEYS["container"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        scratch = re.search(r"PPCL_SCRATCH=(\S+)", (CLUSTER / "Dockerfile").read_text())[1]
        assert scratch in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_ray_job_runs_a_command_that_there_is_and_is_tried_again():
    (document,) = documents("rayjob.yaml")
    name, command, *arguments = shlex.split(document["spec"]["entrypoint"])
    commands = typer.main.get_command(cli.app).commands
    options = {option for parameter in commands[command].params for option in parameter.opts}
    assert name == "ppcl" and {a for a in arguments if a.startswith("--")} <= options
    (container,) = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert any(Path(arguments[0]).is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"])
    assert document["spec"]["backoffLimit"] > 0 and document["spec"]["shutdownAfterJobFinishes"]


def test_the_cloud_file_is_one_that_ray_up_takes():
    (values,) = documents("aws.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(values, schema)
    assert values["head_node_type"] in values["available_node_types"]
    # Files get into the container by the container's own rsync.
    assert values["file_mounts"] and re.search(r"apt-get install .* rsync ", (CLUSTER / "Dockerfile").read_text())
    for commands in (values["head_start_ray_commands"], values["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)


def test_no_dashboard_of_a_file_listens_to_everybody():
    """Ray's job API runs whatever it is sent."""
    for path in CLUSTER.iterdir():
        if path.suffix in (".yaml", ".sh"):
            assert "dashboard-host=0.0.0.0" not in path.read_text() and not re.search(
                r"dashboard-host:.*0\.0\.0\.0", path.read_text()
            ), path


def test_the_image_copies_what_there_is_and_runs_a_python_that_is_new_enough():
    text = (CLUSTER / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for source in sources.split():
            assert (REPOSITORY / source).exists(), source
    major, minor = map(int, re.search(r"^FROM python:(\d+)\.(\d+)", text, re.M).groups())
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert (major, minor) >= tuple(map(int, oldest.groups()))
    assert re.search(r"^USER ray$", text, re.M)


def test_the_two_node_script_says_how_it_is_used():
    run = subprocess.run([CLUSTER / "two_nodes.sh"], capture_output=True, text=True)
    assert run.returncode == 64 and "usage: " in run.stderr
