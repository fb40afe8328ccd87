"""Locations: folders and s3:// URLs, told apart by their text; other schemes are refused in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ppcl.config.location import Location
from ppcl.config.schema import load_config
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.result import Result
from ppcl.storage.manifest import Artifacts
from ppcl.storage.mirror import local_file

UNSERVED = ["gs://bucket/run", "hdfs://host/run", "http://host/run", "file:///run", "S3://bucket/run"]


@pytest.mark.parametrize("text", ["a:b/c", "runs/x", "/abs/x", "C:\\models", "x s3", "gs/b"])
def test_a_path_of_this_machine_keeps_its_text(text):
    location = Location(text)
    assert not location.is_url and str(location) == text and location.path == Path(text)
    assert str(location / "x") == f"{text}/x" and location.absolute().path == Path(text).absolute()
    with pytest.raises(ValueError, match="has no URL"):
        _ = location.url


def test_a_url_is_no_path():
    location = Location("s3://bucket/runs/")
    assert location.is_url and location.url == str(location) == "s3://bucket/runs"
    assert location / "x" == Location("s3://bucket/runs/x") and location.absolute() == location
    with pytest.raises(ValueError, match="has no path"):
        _ = location.path
    with pytest.raises(ValueError, match="has no path"):
        os.fspath(location)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("s3://", "the bucket's name is missing; give s3://bucket/key"),
        ("s3:///key", "the bucket's name is missing"),
        ("s3:/bucket/key", "a URL has two slashes after its scheme"),
        ("", "the location is empty; give a folder"),
    ],
)
def test_what_is_no_location_is_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        Location.of(text)


@pytest.mark.parametrize("text", UNSERVED)
@pytest.mark.parametrize("use", [Artifacts, Result, Teacher, local_file])
def test_a_scheme_that_is_not_served_is_refused_and_makes_no_folder(tmp_path, monkeypatch, use, text):
    monkeypatch.chdir(tmp_path)
    scheme = text.partition("://")[0]
    with pytest.raises(UserError, match=f"{scheme}:// is not served; give a folder or file of this machine, or s3://"):
        use(text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", UNSERVED)
@pytest.mark.parametrize("key", ["teacher", "prompts", "output", "evaluation.prompts"])
@pytest.mark.parametrize("how", ["file", "override"])
def test_a_configuration_with_such_a_scheme_is_refused(tmp_path, key, text, how):
    values = {"teacher": "t", "prompts": "p", "evaluation": {"max_prompts": 3}}
    overrides = [f"{key}={text}"]
    if how == "file":
        section = values["evaluation"] if "." in key else values
        section[key.rpartition(".")[2]], overrides = text, []
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{key} is '{text}': .*:// is not served") as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_an_output_of_the_command_line_with_such_a_scheme_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"teacher": "t", "prompts": "p"}))
    with pytest.raises(UserError, match="output is 'gs://bucket/run': gs:// is not served"):
        load_config(path, output="gs://bucket/run")


def test_the_configuration_imports_no_heavy_library():
    heavy = ("torch", "ray", "fsspec", "s3fs", "numpy", "diffusers", "ppcl.storage")
    code = f"import ppcl.config.schema, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
