"""What travels with a job: the packages that it needs, as installed here, without Ray."""

import re
from importlib.metadata import Distribution, version

import pytest
from packaging.version import Version

from jobs import dependencies
from jobs.dependencies import pinned_dependencies
from ppcl.config.schema import Config
from ppcl.errors import UserError


def pins(**settings):
    return dict(pin.split("==") for pin in pinned_dependencies(Config(teacher="t", prompts="p", **settings)))


def test_all_that_a_job_imports_is_pinned_to_what_is_here_and_ray_is_the_clusters():
    found = pins()
    for name in ("torch", "diffusers", "transformers", "pyarrow", "pandas", "huggingface_hub", "typer"):
        assert found[name] == Version(version(name)).public, name
    assert not {"ray", "ppcl", "pytest", "mypy", "opencensus"} & found.keys()
    assert not any("+" in pin for pin in found.values())  # an index has no 2.13.0+cpu


class Installed(Distribution):
    """A package as importlib finds it, of texts."""

    def __init__(self, name, requires=(), **files):
        lines = [f"Name: {name}", "Version: 1.0+local", *(f"Requires-Dist: {line}" for line in requires)]
        self.files_by_name = {"METADATA": "\n".join(lines) + "\n\n", **files}

    def read_text(self, filename):
        return self.files_by_name.get(filename)

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def installed(monkeypatch):
    """`installed(package, ...)`: these packages and no others are here."""

    def install(*packages):
        by_name = {package.metadata["Name"]: package for package in packages}

        def find(name):
            if name not in by_name:
                raise dependencies.PackageNotFoundError(name)
            return by_name[name]

        monkeypatch.setattr(dependencies, "distribution", find)

    return install


PPCL = Installed(
    "ppcl",
    [
        "a",
        "windows-only; sys_platform == 'win32'",
        "ray[data,default]; extra == 'jobs'",
        "ppcl[jobs]; extra == 'serve'",
        "served; extra == 'serve'",
        "tracker; extra == 'tracking'",
    ],
)
RAY = Installed("ray", ["own", "of-data; extra == 'data'", "of-default; extra == 'default'"])
REST = [Installed(name) for name in ("own", "of-data", "of-default", "served", "tracker", "extra-of-a", "windows-only")]


def test_extras_are_followed_as_far_as_the_job_needs_them(installed):
    installed(PPCL, RAY, Installed("a", ["a[x]", "extra-of-a; extra == 'x'"]), *REST)
    assert pins() == {"a": "1.0", "extra-of-a": "1.0", "of-data": "1.0"}
    assert pins(tracking={"tensorboard": "tb"}).keys() == {"a", "extra-of-a", "of-data", "tracker"}


def test_a_package_of_a_repository_is_sent_as_that_commit(installed):
    source = '{"url": "https://git.example.org/a", "vcs_info": {"vcs": "git", "commit_id": "0123"}}'
    installed(PPCL, RAY, Installed("a", **{"direct_url.json": source}), *REST)
    found = pinned_dependencies(Config(teacher="t", prompts="p"))
    assert found == ["a @ git+https://git.example.org/a@0123", "of-data==1.0"]


def test_what_no_node_could_find_is_told_before_anything_is_sent(installed):
    installed(PPCL, RAY, Installed("a", **{"direct_url.json": '{"url": "file:///home/me/a", "dir_info": {}}'}), *REST)
    told = "--env cannot send a: it is installed here from file:///home/me/a and not from an index, where the nodes"
    with pytest.raises(UserError, match=re.escape(told)):
        pins()
    installed()
    with pytest.raises(UserError, match="--env needs ppcl to be installed here, to know what it depends on"):
        pins()
