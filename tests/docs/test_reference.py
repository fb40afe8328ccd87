"""The generated references say what the configuration and the command line are now."""

import importlib.util
from types import ModuleType

import pytest

from ppcl.config.loading import Section
from ppcl.config.schema import Config
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "architectures.md"])
def test_a_generated_page_is_up_to_date(generate: ModuleType, name: str) -> None:
    assert (DOCS / name).read_text() == generate.PAGES[name](), "run: python docs/generate.py"


def test_the_reference_has_every_key_of_a_job(generate: ModuleType) -> None:
    page = generate.configuration_page()
    for name, field in Config.model_fields.items():
        if isinstance(field.default, Section):
            section = page.split(f"### `{name}`\n")[1].split("\n### ")[0]
            missing = [key for key in type(field.default).model_fields if f"| `{key}` |" not in section]
            assert not missing, f"{name}: {missing}"
        else:
            assert f"| `{name}` |" in page


def test_the_reference_has_every_option_of_a_command(generate: ModuleType) -> None:
    page = generate.commands_page()
    compress = page.split("## `ppcl compress`")[1].split("\n## ")[0]
    for shown in ("`CONFIG`", "`--set`", "`--output`", "`--address`"):
        assert shown in compress
