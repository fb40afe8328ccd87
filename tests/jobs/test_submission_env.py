"""Dependencies that travel with a job to a real cluster whose nodes lack them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest

from jobs import submission
from jobs.submission import Jobs
from ppcl.config.schema import Config
from ppcl.errors import UserError
from tests.heads import started

pytestmark = pytest.mark.dashboard

PACKAGE = "ppcl_test_package"


def wheel(folder):
    """The smallest package that can be installed."""
    info = f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{PACKAGE}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{PACKAGE}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The job API of a head with Ray and all else that is here, but for one package that its index has.

    Ray copies the environment that the head runs in: this one is small, and looks into ours.
    """
    folder = tmp_path_factory.mktemp("nodes")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    ours = dict.fromkeys(path for path in sys.path if path.endswith("site-packages"))
    assert str(Path(numpy.__file__).parent.parent) in ours
    (site_packages / "ours.pth").write_text("\n".join(ours))
    (folder / "index").mkdir()
    wheel(folder / "index")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "index")}
    (folder / "away").mkdir()
    with started(folder / "away", str(folder / "venv" / "bin" / "python"), **settings) as head:
        yield head.api


@pytest.fixture
def needing(monkeypatch):
    """`needing(requirement)`: a job needs the package, and asks for it like that, beside all that it always needs."""

    def need(requirement):
        always = submission.pinned_dependencies
        monkeypatch.setattr(submission, "pinned_dependencies", lambda config: [*always(config), requirement])
        monkeypatch.setattr(submission, "_NEEDED", (*submission._NEEDED, PACKAGE))

    return need


def ends(cluster, output, env):
    """What a job without a teacher says in the end."""
    jobs = Jobs(cluster)
    identity = jobs.submit(Config(teacher="/no/such/teacher", prompts="/no/prompts.txt", output=output), env=env)
    with pytest.raises(UserError) as told:
        jobs.wait_until_begun(identity)
    return str(told.value)


def test_nodes_that_lack_a_package_say_so_and_install_it_with_env(cluster, needing, tmp_path):
    needing(f"{PACKAGE}==1.0")
    told = ends(cluster, tmp_path / "without", None)
    assert (
        f"the cluster has no {PACKAGE}; install the dependencies of ppcl on its nodes, send them with --env pip" in told
    )
    # Now the job begins, in the environment that was made for it.
    assert "/no/prompts.txt does not exist" in ends(cluster, tmp_path / "with", "pip")


def test_a_package_that_no_index_has_is_told_in_one_sentence(cluster, needing, tmp_path):
    needing("ppcl_test_missing==1.0")
    told = ends(cluster, tmp_path / "result", "pip")
    assert (
        "the nodes could not install what it needs (No matching distribution found for ppcl_test_missing==1.0)" in told
    )
    assert "or the image of cluster/Dockerfile and no --env" in told and "\n" not in told and len(told) < 400


UV_ERROR = """runtime_env setup failed: Failed to set up runtime environment.
Traceback (most recent call last):
ray._private.runtime_env.utils.SubprocessCalledProcessError: Run cmd[7] failed with the following details.
Command '['python', '-m', 'uv', 'pip', 'install']' returned non-zero exit status 1.
Last 50 lines of stdout:
    Using Python 3.11.7 environment at: /tmp/virtualenv
      × No solution found when resolving dependencies:
      ╰─▶ Because ppcl-test-missing was not found in the package registry and
          you require ppcl-test-missing==1.0, we can conclude that your
          requirements are unsatisfiable.
"""


def test_the_reason_of_uv_is_told_in_one_sentence():
    assert submission._installer_error(UV_ERROR) == (
        "No solution found when resolving dependencies: Because ppcl-test-missing was not found in the package "
        "registry and you require ppcl-test-missing==1.0, we can conclude that your requirements are unsatisfiable."
    )


@pytest.mark.parametrize("env", ["pip", "uv"])
def test_the_installer_that_was_asked_for_gets_the_pins(env):
    config = Config(teacher="t", prompts="p")
    environment = submission._environment(config, env)
    assert environment[env]["packages"] == submission.pinned_dependencies(config)
    assert {"pip", "uv"} & environment.keys() == {env}
    assert not {"pip", "uv"} & submission._environment(config, None).keys()
