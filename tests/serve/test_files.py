"""The files for clusters: what they say is what the code reads."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ppcl.config.location import Location
from ppcl.errors import UserError
from serve.config import Served, commented_defaults, load_settings
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


def test_the_printed_defaults_are_settings_that_load(tmp_path):
    (tmp_path / "printed.yaml").write_text(commented_defaults())
    assert load_settings(Path("r"), tmp_path / "printed.yaml") == Served(result="r")


def test_settings_come_from_defaults_then_the_file_then_the_command(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("engine:\n  batch: 2\n  queue: 3\nhttp:\n  port: 9000\n")
    settings = load_settings(Path("r"), path, ["engine.queue=5"], {"host": None, "port": 9001})
    assert (settings.engine.batch, settings.engine.queue, settings.http.port, settings.http.host) == (
        2,
        5,
        9001,
        "127.0.0.1",
    )


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("engine: {batch: 0}", [], "engine.batch is 0: input should be greater than or equal to 1"),
        ("engin: {}", [], "unknown key engin; the nearest is engine"),
        ("[1]", [], "is not a mapping of keys to values; `ppcl config --serve` prints one"),
        ("{}", ["engine.batch"], "is not of the form key=value, such as engine.batch=4"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence(tmp_path, text, overrides, sentence):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_settings(Path("r"), path, overrides)


def test_a_host_is_taken_as_text():
    assert load_settings(Path("r"), None, None, {"host": "::", "port": None}).http.host == "::"
