"""A wheel holds what an installation needs, and its command runs in an environment that has no checkout."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ppcl import __version__
from tests.conftest import REPOSITORY

DATA_FILES = [
    "ppcl/py.typed",
    "jobs/py.typed",
    "serve/py.typed",
    "ppcl/report/report.html.j2",
    "ppcl/sizing/qwen-image.json",
    "ppcl/sizing/flux.1-dev.json",
    "ppcl/sizing/sd3.5-large.json",
    "serve/playground/page.css",
    "serve/playground/page.html.j2",
    "serve/playground/page.js",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(REPOSITORY)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a new environment with the wheel, which sees this one's dependencies only."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    # A path line adds a folder without its own .pth files, so the editable checkout does not come along.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_wheel_holds_the_file(wheel: Path, name: str) -> None:
    assert name in zipfile.ZipFile(wheel).namelist()


def test_a_wheel_says_its_version_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    information = f"ppcl-{__version__}.dist-info"
    metadata = archive.read(f"{information}/METADATA").decode()
    assert f"Version: {__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{information}/licenses/LICENSE" in archive.namelist()


def test_the_library_alone_depends_on_neither_ray_nor_matplotlib(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"ppcl-{__version__}.dist-info/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert any("torch" in line for line in needed)
    assert not [line for line in needed if any(name in line for name in ("ray", "matplotlib", "fastapi", "typer"))]


def test_an_installed_package_is_imported_from_its_environment(clean_environment: Path, tmp_path: Path) -> None:
    ended = run([str(clean_environment / "python"), "-c", "import ppcl; print(ppcl.__file__)"], tmp_path)
    assert Path(ended.stdout.strip()).is_relative_to(clean_environment.parent), ended.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], f"ppcl {__version__}"),
        (["config"], "distillation:"),
        (["config", "--serve"], "http:"),
        (["plan", "qwen-image"], "20.43 billion parameters"),
    ],
)
def test_an_installed_command_runs(
    clean_environment: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    ended = run([str(clean_environment / "ppcl"), *arguments], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert expected in ended.stdout
