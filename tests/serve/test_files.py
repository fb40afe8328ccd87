"""The files for clusters: what they say is what the code reads."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ppcl.config.location import Location
from ppcl.errors import UserError
from serve.config import Served
from serve.engine.metrics import INSTRUMENTS

REPOSITORY = Path(__file__).resolve().parents[2]


def serve_file():
    return yaml.safe_load((REPOSITORY / "serve" / "serve.yaml").read_text())


def rayservice():
    return yaml.safe_load((REPOSITORY / "cluster" / "rayservice.yaml").read_text())


@pytest.mark.parametrize(
    "values",
    [serve_file, lambda: yaml.safe_load(rayservice()["spec"]["serveConfigV2"])],
    ids=["serve deploy", "KubeRay"],
)
def test_ray_takes_the_file_and_we_take_its_args(values):
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(values()).applications
    module, name = application.import_path.split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert Served.model_validate(application.args).result == Location("/data/result")


def test_kubernetes_waits_for_replicas_longer_than_they_may_take():
    spec = rayservice()["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    longest = Served.model_validate(application["args"]).autoscaling.shutdown_seconds
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > longest
    assert workers["maxReplicas"] >= Served.model_validate(application["args"]).autoscaling.max_replicas


def test_a_cluster_without_api_keys_is_refused(monkeypatch):
    from serve.ray_app import from_args

    monkeypatch.delenv("PPCL_API_KEYS", raising=False)
    args = {"result": "/data/result", "engine": {"device": "cpu"}}
    with pytest.raises(UserError, match="needs API keys; set PPCL_API_KEYS on its nodes"):
        from_args(args)
    with pytest.raises(UserError, match="args: unknown key engine.batc; the nearest is engine.batch"):
        from_args(args | {"engine": {"batc": 3}})
    monkeypatch.setenv("PPCL_API_KEYS", "a-key")
    assert type(from_args(args)).__name__ == "Application"


def test_the_dashboard_shows_what_the_engine_counts():
    """Names as Ray exports them, which `test_deployment` sees: a prefix, and counters with `_total`."""
    text = (REPOSITORY / "cluster" / "grafana.json").read_text()
    exported = {}
    for one in INSTRUMENTS:
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_sum", "_count"]}[one.kind]
        exported |= {f"ray_{one.name}{end}": one for end in ends}
    asked = set(re.findall(r"ray_ppcl_\w+", text))
    assert asked <= set(exported) and {exported[name] for name in asked} == set(INSTRUMENTS)
    for panel in json.loads(text)["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                labels = {
                    label for name in re.findall(r"ray_ppcl_\w+", target["expr"]) for label in exported[name].labels
                }
                assert label in labels | {"replica"}
