"""The configuration: every mistake is a sentence that names the key, and the printed defaults are the defaults."""

import pytest
import yaml
from pydantic import BaseModel

from ppcl.config.schema import Config, commented_defaults, load_config
from ppcl.errors import UserError

GOOD = {"teacher": "models/t", "prompts": "p.txt"}


@pytest.mark.parametrize(
    ("values", "overrides", "sentence"),
    [
        (GOOD | {"step": 1}, [], "unknown key step; known here: teacher, prompts"),
        (GOOD | {"distillation": {"lr": 1}}, [], "unknown key distillation.lr; known here: steps"),
        (GOOD | {"distilation": {}}, [], "unknown key distilation; the nearest is distillation; known here"),
        (
            GOOD,
            ["distillation.stpes=1"],
            "unknown key distillation.stpes; the nearest is distillation.steps; known here",
        ),
        (GOOD | {"step": 1, "sede": 2}, [], r"unknown key sede; .* \(and 1 more\)"),
        (GOOD | {3: 1}, [], "3 is 3: keys should be strings"),
        (GOOD, ["distillation.steps=-3"], "distillation.steps is -3: input should be greater than or equal to 1"),
        (GOOD, ["calibration.validation=1"], "calibration.validation is 1"),
        (GOOD, ["calibration.validation=0.5", "calibration.test=0.5"], "leaves no prompts to train on"),
        (GOOD, ["variants.budgets=[0.5, 1.5]"], "variants.budgets.1 is 1.5: input should be less than 1"),
        (GOOD, ["distillation.betas=[0.9, 1.0]"], "distillation.betas.1 is 1.0: input should be less than 1"),
        (
            GOOD,
            ["distillation.learning_rate=.inf"],
            "distillation.learning_rate is inf: input should be a finite number",
        ),
        (
            GOOD,
            ["distillation.data_parallel=20"],
            "distillation.data_parallel is 20: it must not be more than batch_size, 16: each replica",
        ),
        (
            GOOD,
            ["finetuning.batch_size=2", "finetuning.data_parallel=3"],
            "finetuning.data_parallel is 3: it must not be more than batch_size, 2",
        ),
        (GOOD, ["probes.ridge=.nan"], "probes.ridge is nan"),
        (GOOD, ["sampling.steps=2.5"], "sampling.steps is 2.5: input should be a valid integer"),
        (GOOD, ["variants.custom.mine=3"], "variants.custom.mine is 3: input should be a valid list"),
        (GOOD, ["detection.stream=audio"], "detection.stream is 'audio'"),
        (GOOD, ["seed.x=1"], "seed is {'x': 1}: input should be a valid integer"),
        (GOOD, ["seed"], "not of the form key=value"),
        (GOOD, ["=1"], "not of the form key=value"),
        (GOOD, ["sampling..steps=1"], "not of the form key=value"),
        (GOOD | {"sampling": 3}, ["sampling.steps=1"], "--set 'sampling.steps=1': sampling is a value, not a section"),
        (GOOD | {"sampling": 3}, [], "sampling is 3: it is a section, with the keys steps, height"),
        (GOOD | {"teacher": 3}, [], "teacher is 3: input should be a path"),
        ("teacher:\nprompts: p", [], "the key teacher is missing"),
        (
            GOOD,
            ["variants.targets.half=0.5"],
            "variants.targets.half is 0.5: it is a section, with the keys parameters",
        ),
        (
            GOOD,
            ["variants.targets.half.parameter=0.5"],
            "unknown key variants.targets.half.parameter; the nearest is variants.targets.half.parameters; known here: "
            "parameters, speedup",
        ),
        (
            GOOD,
            ["variants.targets.x={}"],
            "variants.targets.x is {}: a target asks for parameters, for speedup or for both",
        ),
        (
            GOOD,
            ["variants.targets={3: {speedup: 2}}"],
            "variants.targets has the key 3, which is not text; put it in quotes",
        ),
        (GOOD, ["variants.targets=[1]"], r"variants.targets is \[1\]: input should be a mapping of keys to values"),
        (GOOD, ["variants.budgets=[0.9, 0.5, 0.9]"], "variants.budgets asks for the variant p90 twice; remove one"),
        (GOOD, ["variants.blocks=[12, 12]"], "variants.blocks asks for the variant b12 twice; remove one"),
        (GOOD, ["variants.budget=[0.5]"], "unknown key variants.budget; the nearest is variants.budgets; known here"),
        (GOOD, ["variants.custom.mine=['2--4']"], "variants.custom.mine: '2--4' is not a replacement; write intervals"),
        (GOOD, ["variants.custom.mine=['2-4,ffn:7']"], "variants.custom.mine: '2-4,ffn:7' is not a replacement"),
        (GOOD, ["variants.custom.mine=['ffn:7/100']"], "variants.custom.mine: 'ffn:7/100' is not a replacement"),
        (
            GOOD,
            ["variants.custom.mine=[[4, 2]]"],
            r"variants.custom.mine: the interval \[4, 2\] has fewer than two blocks",
        ),
        (GOOD, ["variants.custom.mine=[[1, 2, 3]]"], r"variants.custom.mine.0 is \[1, 2, 3\]: write an interval as"),
        (GOOD, ["variants.custom.mine=[]"], "variants.custom.mine is empty; list what is on"),
        (GOOD, ["variants.custom.all=[[1, 2]]"], "variants.custom: the name 'all' is taken"),
        (
            GOOD,
            ["finetuning.variants=[half]"],
            "finetuning.variants: there is no variant 'half'; there are p90, p80, p70, all",
        ),
        (GOOD, ["finetuning.variants=[p90, p90]"], "finetuning.variants names 'p90' twice; remove one"),
        (
            GOOD,
            ["finetuning.plan=alll"],
            "finetuning.plan is 'alll': it is neither variants nor any, no variant .* and no plan",
        ),
        (
            GOOD,
            ["distillation.steps=10", "distillation.warmup=11"],
            "distillation.warmup is 11: it must not be more than distillation.steps, 10",
        ),
        (GOOD, ["finetuning.steps=10", "finetuning.warmup=11"], "finetuning.warmup is 11: it must not be more than"),
        (GOOD, ["sampling.height=9"], "sampling.height is 9: input should be a multiple of 8"),
        (GOOD, ["seed=true"], "seed is True: input should be a number, not true or false"),
        (GOOD, ["width.linear_ffns=true"], "width.linear_ffns is True: input should be a number"),
        (
            GOOD,
            ["width.ffn_keep_percents=[50, x]"],
            "width.ffn_keep_percents.1 is 'x': input should be a valid integer",
        ),
        (GOOD, ["distillation.betas=0.9"], "distillation.betas is 0.9: input should be a list"),
        (
            GOOD,
            ["steps=3"],
            "unknown key steps; there is sampling.steps, distillation.steps, finetuning.steps, .*; known",
        ),
        (
            GOOD,
            ["distillation.checker=shapes"],
            "unknown key distillation.checker; there is evaluation.checker; known here",
        ),
        (GOOD | {"output": None}, [], "output is None: input should be a path or an s3:// URL"),
        (GOOD, [f"device={'x' * 5000}"], "device is 'x+…: input should be 'auto', 'cpu' or 'cuda'"),
        (
            GOOD,
            ["tracking.tensorboard=s3://runs/tb"],
            "tracking.tensorboard is 's3://runs/tb': its files are appended to",
        ),
        (GOOD, ["tracking.mlflow.url=http://x"], "unknown key tracking.mlflow.url; the nearest is tracking.mlflow.uri"),
        (
            GOOD,
            ["tracking.mlflow.uri=https://me:pa55word@mlflow.example.org"],
            "tracking.mlflow.uri holds a user or a password, which no configuration may; set MLFLOW_TRACKING_USERNAME",
        ),
        (GOOD, ["tracking.wandb.mode=later"], "tracking.wandb.mode is 'later': input should be 'online' or 'offline'"),
        (
            GOOD,
            ["sampling.arguments={sigmas: [1.0, 0.5]}"],
            "sampling.arguments.sigmas has 2 values, and sampling.steps is 20; set sampling.steps to 2",
        ),
        (GOOD, ["sampling.arguments={sigmas: [0.5, 1.0]}", "sampling.steps=2"], "give a falling list of numbers"),
        (GOOD, ["sampling.arguments={sigmas: [1.0, 0.0]}", "sampling.steps=2"], "without the 0 at its end"),
        (GOOD, ["sampling.arguments={sigmas: 3}"], "sampling.arguments.sigmas is 3; give a falling list"),
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
    said = str(caught.value)
    assert "pa55word" not in said
    assert "\n" not in said and "pydantic" not in said and "pathlib" not in said and len(said) < 400


@pytest.mark.parametrize(
    "section", [name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)]
)
def test_an_unknown_key_is_refused_in_every_section(write, section):
    with pytest.raises(UserError, match=f"unknown key {section}.unheard_of; known here: "):
        load_config(write(GOOD | {section: {"unheard_of": 1}}))


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


@pytest.mark.parametrize(
    "overrides",
    [
        ["distillation.steps=10"],
        ["finetuning.warmup=5"],
        ["finetuning.plan=2-4,ffn:7/50,modulations", "finetuning.steps=3"],
        ["finetuning.plan=mine", "variants.custom.mine=[[2, 4], 'text:5-7', modulations]"],
        ["finetuning.variants=[half, p90]", "variants.targets.half.speedup=1.5"],
        ["width.text=false", "sampling.height=24"],
        ["sampling.arguments={sigmas: [1, 0.5]}", "sampling.steps=2"],
        ["tracking.mlflow={}", "tracking.wandb.project=shapes", "tracking.tensorboard=runs/tb"],
    ],
)
def test_what_is_right_is_not_refused(write, overrides):
    load_config(write(GOOD), overrides)
