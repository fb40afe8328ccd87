"""The configuration: every mistake is a sentence that names the key, and the printed defaults are the defaults."""

import pytest
import yaml
from pydantic import BaseModel

from ppcl.config import Config, commented_defaults, load_config
from ppcl.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(values):
        path = tmp_path / "job.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


GOOD = {"teacher": "models/t", "prompts": "p.txt"}


def test_paths_of_the_file_are_relative_to_it_and_overrides_win(write, tmp_path):
    path = write(GOOD | {"distillation": {"steps": 7}})
    config = load_config(path, ["distillation.steps=9", "variants.budgets=[0.5]", "sampling.arguments.true_cfg_scale=4.0"], "out")
    assert config.teacher == tmp_path / "models/t" and config.prompts == tmp_path / "p.txt"
    assert (config.distillation.steps, config.variants.budgets, str(config.output)) == (9, [0.5], "out")
    assert config.sampling.arguments == {"true_cfg_scale": 4.0}


@pytest.mark.parametrize(
    ("values", "overrides", "sentence"),
    [
        (GOOD | {"step": 1}, [], "unknown key step; known here: teacher, prompts"),
        (GOOD | {"distillation": {"lr": 1}}, [], "unknown key distillation.lr; known here: steps"),
        (GOOD, ["distillation.steps=-3"], "distillation.steps is -3: input should be greater than or equal to 1"),
        (GOOD, ["calibration.held_out=1"], "calibration.held_out is 1"),
        (GOOD, ["variants.budgets=[0.5, 1.5]"], "1.5 is no share of the parameters"),
        (GOOD, ["detection.stream=audio"], "detection.stream is 'audio'"),
        (GOOD, ["seed.x=1"], "seed is {'x': 1}: input should be a valid integer"),
        (GOOD, ["seed"], "not of the form key=value"),
        (GOOD, ["seed=[1"], "not valid YAML"),
        ({"teacher": "t"}, [], "the key prompts is missing"),
        ("", [], "is not a mapping"),
        ("- a", [], "is not a mapping"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence(write, values, overrides, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_config(write(values), overrides)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist; `ppcl config` prints one"):
        load_config(tmp_path / "no.yaml")


def fields(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def test_the_printed_defaults_are_the_defaults_and_every_key_is_described(tmp_path):
    printed = commented_defaults()
    values = yaml.safe_load(printed)
    for key, field in fields(Config):
        assert field.description, key
        assert f"# {field.description}" in printed
        here = values
        for part in key.split("."):
            assert part in here, key
            here = here[part]
    values |= {"teacher": "t", "prompts": "p"}
    assert Config.model_validate(values) == Config(teacher="t", prompts="p")
