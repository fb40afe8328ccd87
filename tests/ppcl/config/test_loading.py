"""A configuration is a file and overrides; keys of the version before are read with a warning."""

import pytest
import yaml

from ppcl.config.schema import Config, load_config
from ppcl.errors import UserError

GOOD = {"teacher": "models/t", "prompts": "p.txt"}


def test_paths_of_the_file_are_relative_to_it_and_overrides_win(write, tmp_path):
    path = write(GOOD | {"distillation": {"steps": 7}})
    config = load_config(
        path, ["distillation.steps=9", "variants.budgets=[0.5]", "sampling.arguments.true_cfg_scale=4.0"], "out"
    )
    assert config.teacher.path == tmp_path / "models/t" and config.prompts.path == tmp_path / "p.txt"
    assert (config.distillation.steps, config.variants.budgets, str(config.output)) == (9, [0.5], "out")
    assert config.sampling.arguments == {"true_cfg_scale": 4.0}


def test_a_section_without_keys_has_the_defaults_and_can_be_overridden(write):
    path = write("teacher: t\nprompts: p\ndistillation:\n  # steps: 3\n")
    assert load_config(path).distillation == Config(teacher="t", prompts="p").distillation
    assert load_config(path, ["distillation.steps=5"]).distillation.steps == 5


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist; `ppcl config` prints one"):
        load_config(tmp_path / "no.yaml")


OLD_KEYS = {
    "patience": "worker_timeout_s",
    "calibration.limit": "calibration.max_prompts",
    "width.hidden": "width.ffn_keep_percents",
    "width.ffns": "width.linear_ffns",
    "width.modulations": "width.low_rank_modulations",
    "distillation.start": "distillation.init",
    "distillation.student_hidden": "distillation.student_keep_percent",
    "distillation.pipeline": "distillation.pipeline_parallel",
    "distillation.replicas": "distillation.data_parallel",
    "finetuning.own_states": "finetuning.rollout_share",
    "finetuning.recompute": "finetuning.activation_checkpointing",
    "finetuning.replicas": "finetuning.data_parallel",
    "finetuning.measured": "finetuning.measured_plans",
    "evaluation.world": "evaluation.checker",
    "evaluation.limit": "evaluation.max_prompts",
}


OLD_VALUES = {
    "patience": 12.0,
    "width.hidden": [33],
    "width.modulations": False,
    "distillation.start": "middle",
    "finetuning.own_states": 0.25,
    "finetuning.recompute": False,
    "evaluation.world": "shapes",
}


def nested(key, value):
    """`{"a": {"b": value}}` for `a.b`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def lookup(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
@pytest.mark.parametrize("how", ["file", "--set"])
def test_an_old_key_works_with_one_warning_that_names_the_new_one(write, caplog, how, old, new):
    value = OLD_VALUES.get(old, 2)
    if how == "file":
        config = load_config(write(GOOD | nested(old, value)))
    else:
        config = load_config(write(GOOD), [f"{old}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"])
    assert lookup(config, new) == value != lookup(Config(teacher="t", prompts="p"), new)
    assert len(caplog.messages) == 1 and f"{old} is now {new}" in caplog.messages[0]


def test_an_old_key_beside_the_new_one_is_refused(write):
    path = write(GOOD | {"distillation": {"start": "first", "init": "middle"}})
    with pytest.raises(
        UserError, match="distillation: start is the old name of init, and both are given; remove start"
    ):
        load_config(path)


def test_an_override_by_the_old_name_wins_over_the_file(write):
    path = write(GOOD | {"distillation": {"init": "first"}})
    assert load_config(path, ["distillation.start=middle"]).distillation.init == "middle"


def test_current_keys_are_read_without_a_warning(write, caplog):
    load_config(write(GOOD | {"distillation": {"init": "first"}}), ["worker_timeout_s=3"])
    assert not caplog.messages
