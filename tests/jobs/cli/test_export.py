"""`ppcl export`: what it writes, what it says, and its mistakes in one sentence each."""

import json

import pytest

from ppcl.models.teacher import Teacher
from tests import made_result
from tests.ppcl.lora.loras import written


@pytest.fixture(scope="module")
def result(tmp_path_factory, teacher_folder):
    return made_result.result(tmp_path_factory.mktemp("result") / "job", teacher_folder)


def test_a_stock_variant_and_one_that_brings_its_module(result, ppcl, tmp_path):
    code, said, error = ppcl("export", result, "--variant", "p90", "--to", tmp_path / "small")
    assert code == 0, error
    assert (
        said.strip()
        == f"{tmp_path}/small: QwenImageTransformer2DModel, 204,048 parameters, 84.3 % of the teacher's, bfloat16"
    )
    code, said, _ = ppcl("export", result, "--variant", "all", "--to", tmp_path / "all", "--dtype", "float16")
    assert code == 0 and "import ppcl_transformer.py, which lies in the folder, before the model is loaded" in said
    assert json.loads((tmp_path / "all" / "model_index.json").read_text())["transformer"][0] == "ppcl_transformer"
    code, said, _ = ppcl(
        "export", result, "--variant", "p90", "--to", tmp_path / "m.safetensors", "--format", "single-file"
    )
    assert code == 0 and (tmp_path / "m.safetensors").exists()


def test_a_lora_becomes_part_of_it_and_is_put_on_an_image(result, ppcl, teacher_folder, tmp_path):
    lora = written("qwen", Teacher(teacher_folder), tmp_path / "lora")
    plan = ["--variant", "p90", "--lora", lora, "--lora-scale", "0.5"]
    code, said, error = ppcl("export", result, *plan, "--to", tmp_path / "out", "--transformer-only")
    assert code == 0, error
    told = "of the LoRA is on, by the squared norm of its update; left out: transformer_blocks.2"
    assert f"with the LoRA {lora.name}, 0.5 times its strength: " in said and told in said
    code, said, error = ppcl("generate", result, "a red circle", *plan, "-o", tmp_path / "with.png")
    assert code == 0 and f"{lora}: " in said and told in said, error
    ppcl("generate", result, "a red circle", "--variant", "p90", "-o", tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_lora_is_transferred_to_students(result, ppcl, teacher_folder, tmp_path):
    lora = written("qwen", Teacher(teacher_folder), tmp_path / "lora")
    plan = ["--variant", "p90", "--lora", lora, "--lora-transfer"]
    told = "; transferred to students: transformer_blocks.2."
    code, said, error = ppcl("export", result, *plan, "--to", tmp_path / "out", "--transformer-only")
    assert code == 0 and told in said and "ppcl_transformer.py" not in said, error
    code, said, error = ppcl("generate", result, "a red circle", *plan, "-o", tmp_path / "transferred.png")
    assert code == 0 and told in said and "; left out: transformer_blocks.3." in said, error
    ppcl("generate", result, "a red circle", *plan[:-1], "-o", tmp_path / "left-out.png")
    assert (tmp_path / "transferred.png").read_bytes() != (tmp_path / "left-out.png").read_bytes()
    plan[1] = "all"
    code, _, error = ppcl("generate", result, "a red circle", *plan, "-o", tmp_path / "all.png")
    assert code == 2 and "has no calibration samples, to which a LoRA's transfer to students" in error


MISTAKES = {
    "no LoRA to transfer": (["--variant", "p90", "--to", "{}/out", "--lora-transfer"], "has no LoRA to transfer"),
    "no LoRA": (["--variant", "p90", "--to", "{}/out", "--lora", "{}/file.safetensors"], "file.safetensors"),
    "no such variant": (["--variant", "p10", "--to", "{}/out"], "there is no variant 'p10'; there are teacher, p90"),
    "taken": (["--variant", "p90", "--to", "{}/taken"], "taken exists already; give --to another place, or remove it"),
    "a file": (["--variant", "p90", "--to", "{}/file"], "file exists already"),
    "not stock": (
        ["--variant", "all", "--to", "{}/m.safetensors", "--format", "single-file"],
        "all holds students that end in an affine map, which the layout of the original release cannot hold; of this "
        "result p90, p75 would do",
    ),
    "no file name": (
        ["--variant", "p90", "--to", "{}/m", "--format", "single-file"],
        "a single file ends in .safetensors",
    ),
    "both": (
        ["--variant", "p90", "--to", "{}/m.safetensors", "--format", "single-file", "--transformer-only"],
        "--transformer-only is for --format diffusers",
    ),
    "format": (["--variant", "p90", "--to", "{}/out", "--format", "gguf"], "'gguf' is not one of"),
    "scheme": (["--variant", "p90", "--to", "gs://b/out"], "gs:// is not served"),
    "no teacher": (["--variant", "p90", "--to", "{}/out", "--teacher", "/no/such"], "/no/such does not exist any more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(result, ppcl, tmp_path, mistake):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    arguments, sentence = MISTAKES[mistake]
    code, said, error = ppcl("export", result, *(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and not said
    assert error.startswith("ppcl: ") and sentence in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
