"""What a user types: every mistake ends in one sentence, an exit code that is not 0, and nothing written."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY

PROMPTS = "a photo of a red circle\na photo of a blue square\na photo of a green cross\n"


@pytest.fixture
def here(tmp_path, teacher_folder):
    """A folder with a good job: `config.yaml`, `prompts.txt`."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    values = {
        "teacher": str(teacher_folder),
        "prompts": "prompts.txt",
        "output": str(tmp_path / "result"),
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def copy_of(folder, where):
    return shutil.copytree(folder, where / "copy")


def edited(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def missing_configuration(here):
    (here / "config.yaml").unlink()


def missing_prompts(here):
    (here / "prompts.txt").unlink()


def empty_prompts(here):
    (here / "prompts.txt").write_text("\n \n")


def one_prompt(here):
    (here / "prompts.txt").write_text("a red circle\n")


def output_is_a_file(here):
    (here / "result").write_text("mine")


def output_is_foreign(here):
    (here / "result").mkdir()
    (here / "result" / "thesis.tex").write_text("mine")


MISTAKES = {
    "missing configuration": (missing_configuration, [], "config.yaml does not exist"),
    "missing prompts": (missing_prompts, [], "prompts.txt does not exist"),
    "empty prompts": (empty_prompts, [], "prompts.txt holds no prompts"),
    "one prompt": (one_prompt, [], "only 1 different prompt"),
    "output is a file": (output_is_a_file, [], "result is a file"),
    "output is foreign": (output_is_foreign, [], "is not empty and is not a ppcl job"),
    "unknown key": (None, ["--set", "distillation.step=3"], "unknown key distillation.step"),
    "out of range": (None, ["--set", "distillation.steps=0"], "distillation.steps is 0"),
    "wrong type": (None, ["--set", "sampling.height=tall"], "sampling.height is 'tall'"),
    "bucket without a name": (
        None,
        ["--output", "s3://"],
        "output is 's3://': the bucket's name is missing; give s3://bucket/key",
    ),
    "not key=value": (None, ["--set", "distillation.steps"], "is not of the form key=value"),
    "teacher is nowhere": (None, ["--set", "teacher=/no/such/folder"], "is not a diffusers pipeline folder"),
    "evaluation prompts": (None, ["--set", "evaluation.prompts=/no/such.txt"], "/no/such.txt does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(here, ppcl, mistake):
    make, arguments, sentence = MISTAKES[mistake]
    if make:
        make(here)
    before = sorted(here.rglob("*"))
    code, said, error = ppcl("compress", here / "config.yaml", *arguments)
    assert code == 2
    assert error.startswith("ppcl: ") and sentence in error and error.count("\n") == 1
    assert "Traceback" not in said + error
    assert sorted(here.rglob("*")) == before


def test_a_column_that_is_not_there_is_named_with_those_that_are(here, ppcl):
    (here / "prompts.csv").write_text("caption,author\na red circle,me\na blue square,me\n")
    code, _, error = ppcl("compress", here / "config.yaml", "--set", f"prompts={here / 'prompts.csv'}")
    assert code == 2 and "no column 'prompt'" in error and "caption, author" in error


def test_an_unsupported_transformer_is_named_with_the_nearest_supported_one(here, ppcl, teacher_folder):
    copy = copy_of(teacher_folder, here)
    edited(copy / "model_index.json", lambda v: v.update(transformer=["diffusers", "PixArtTransformer2DModel"]))
    code, _, error = ppcl("compress", here / "config.yaml", "--set", f"teacher={copy}")
    assert code == 2 and "PixArtTransformer2DModel is not supported; the nearest supported one is" in error


def test_a_pickle_is_refused(here, ppcl, teacher_folder):
    copy = copy_of(teacher_folder, here)
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    code, _, error = ppcl("compress", here / "config.yaml", "--set", f"teacher={copy}")
    assert code == 2 and "is a pickle" in error and not (here / "result").exists()


def test_another_jobs_folder_is_left_alone(here, ppcl):
    from ppcl.storage.manifest import Artifacts

    Artifacts(here / "result").start({"teacher": "/another", "teacher_sha256": "0", "prompts": "1"})
    before = (here / "result" / "manifest.json").read_bytes()
    code, _, error = ppcl("compress", here / "config.yaml")
    assert code == 2 and "holds another job" in error and "/another" in error
    assert [p.name for p in (here / "result").iterdir()] == ["manifest.json"]
    assert (here / "result" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("command", [["variants"], ["report"], ["generate"]])
def test_a_folder_that_is_no_result_is_told(here, ppcl, command):
    extra = ["a prompt", "-o", here / "x.png"] if command == ["generate"] else []
    code, _, error = ppcl(*command, here, *extra)
    assert code == 2 and "is not a ppcl result" in error and not (here / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["", "-o", "x.png"], "the prompt is empty"),
        (["a circle", "-o", "x.tex"], "is not an image file"),
        (["a circle", "-o", "no/such/x.png"], "does not exist"),
    ],
)
def test_generate_refuses_before_it_loads_anything(here, ppcl, monkeypatch, arguments, sentence):
    monkeypatch.chdir(here)
    code, _, error = ppcl("generate", here, *arguments)
    assert code == 2 and sentence in error


def test_config_prints_a_configuration_that_loads(here, ppcl):
    from ppcl.config.schema import Config, load_config

    code, said, _ = ppcl("config")
    assert code == 0
    (here / "printed.yaml").write_text(
        said.replace("teacher: # required", "teacher: t").replace("prompts: # required", "prompts: p")
    )
    loaded = load_config(here / "printed.yaml")
    assert loaded == Config(teacher=here / "t", prompts=here / "p")


def test_plan_simulates_as_json_with_the_rates_it_took(ppcl, teacher_folder):
    code, said, _ = ppcl(
        "plan",
        teacher_folder,
        "--size",
        "64x64",
        "--interval",
        2,
        "--gpus",
        "2,64",
        "--batch",
        8,
        "--simulate",
        "--set",
        "utilisation=0.5",
        "--json",
    )
    made = json.loads(said)
    assert code == 0 and made["device"]["utilisation"] == 0.5
    (model,) = made["models"]
    # Six blocks in pairs: three segments, of which two GPUs can be two; 64 can be neither three nor more replicas than
    # samples.
    assert [(step["gpus"], step["samples"]) for step in model["distillation"]] == [
        (2, 8 // step["dp"]) for step in model["distillation"]
    ]
    assert len(model["refused"]) == 1 and model["refused"][0].startswith("64 GPUs: ")
    assert [step["used"] for step in model["probes"]] == [2, 6]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--grow"], "--grow and --set are for the simulation; add --simulate"),
        (["--simulate", "--set", "utilization=0.5"], "--set: unknown key utilization; the nearest is utilisation"),
        (["--simulate", "--set", "utilisation=2"], "--set: utilisation is 2: input should be less than or equal to 1"),
        (["--gpus", "512"], "each of its 64 replicas needs a sample of a step, which has 16; use larger batches"),
    ],
)
def test_plan_tells_what_cannot_be_simulated(ppcl, given, told):
    code, _, said = ppcl("plan", "qwen-image", *given)
    assert code == 2 and told in said


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--steps", "0"], "Invalid value for '--steps': Input should be greater than or equal to 1"),
        (["--steps", "-1"], "Invalid value for '--steps': Input should be greater than or equal to 1"),
        (["--seed", "-1"], "Invalid value for '--seed': Input should be greater than or equal to 0"),
    ],
)
def test_generate_tells_steps_and_seeds_that_cannot_be(ppcl, tmp_path, given, sentence):
    code, said, wrong = ppcl("generate", tmp_path, "a red circle", *given)
    assert (code, said, wrong) == (2, "", f"ppcl: {sentence}\n")


def test_the_command_line_runs_as_a_module():
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stdout.startswith("ppcl "), ended.stderr


def test_plan_of_a_job_tells_every_stage_of_its_configuration(ppcl, here, teacher_folder):
    (here / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    (here / "job.yaml").write_text(
        f"teacher: {teacher_folder}\nprompts: prompts.txt\ndevice: cpu\nsampling: {{height: 32, width: 32}}\n"
        "probes: {workers: 3}\n"
    )
    code, said, _ = ppcl("plan", "--job", here / "job.yaml", "--set", "probes.workers=2", "--set", "size=1e9", "--json")
    assert code == 0
    (job,) = json.loads(said)["jobs"]
    assert job["prompts"] == 3
    workers = {(one["stage"], one["worker"]): one for one in job["workers"]}
    assert workers["probes", "rank"]["count"] == 2 and ("finetuning", "rank") not in workers
    assert all(one["device_bytes"] == sum(one["device"].values()) for one in workers.values())
    assert job["sentences"] == ["all workers of a stage together fit 1 GB, of which nine tenths are usable"]


def test_plan_of_a_published_model_says_what_does_not_fit_a_kind_of_gpu(ppcl):
    code, said, _ = ppcl("plan", "qwen-image", "--stages", "--gpus", "8", "--device", "rtx4090", "--prompts", "100")
    assert code == 0
    assert "every stage on 8 GPUs (RTX 4090" in said and "finetuning" in said
    assert "students needs" in said and "and the largest GPU here has 24 GB" in said


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--stages", "--simulate"], "--simulate and --grow are for the distillation alone"),
        (["--stages", "--gpus", "1,2"], "--gpus 1,2: a whole job is laid out on one number of GPUs; give one"),
        (["--stages", "--device", "h900"], "--device 'h900' is not known; known are h100, h200, a100, l40s, rtx4090"),
        (["--job", "job.yaml"], "give models or --job, not both"),
        (["--prompts", "10"], "--prompts is for a whole job; add --stages"),
        (["--gpus", "none"], "--gpus 'none' are no numbers of GPUs"),
        (["--size", "big"], "--size 'big' is no size"),
    ],
)
def test_plan_tells_what_does_not_go_together(ppcl, given, told):
    code, _, said = ppcl("plan", "qwen-image", *given)
    assert code == 2 and told in said


def test_plan_of_the_distillation_is_a_table_of_numbers_of_gpus(ppcl):
    code, said, _ = ppcl("plan", "sd3.5-large", "--gpus", "1,8")
    assert code == 0 and "SD3.5-large: 8.06 billion parameters" in said and "8 × 1" in said
    code, said, _ = ppcl("plan", "sd3.5-large", "--gpus", "1,8", "--json")
    assert [rank["gpus"] for rank in json.loads(said)[0]["ranks"]] == [1, 8]
