"""One result, many variants: plugged into the stock pipeline, switched by moving references, refused if tampered."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.result import Result
from ppcl.storage.manifest import Artifacts
from tests import made_result, tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory, teacher_folder):
    return made_result.result(tmp_path_factory.mktemp("result") / "job", teacher_folder)


@pytest.fixture(scope="module")
def result(root):
    return Result(root)


@pytest.fixture(scope="module")
def pipeline(result):
    return result.pipeline()


@torch.no_grad()
def velocity(pipeline):
    return pipeline.transformer(**tiny.inputs(pipeline.transformer), return_dict=False)[0]


def test_switching_moves_references_only(result, pipeline):
    blocks = list(pipeline.transformer.transformer_blocks)
    storages = {name: p.data_ptr() for name, p in pipeline.transformer.named_parameters()}
    teachers = velocity(pipeline)
    seen = {}
    for name in ("all", "ends", "p90", "all"):
        result.switch(pipeline, name)
        now = list(pipeline.transformer.transformer_blocks)
        assert len(now) == len(blocks)
        kept = [i for i in range(6) if not any(i in interval.blocks for interval in result.variants[name].plan)]
        assert all(now[i] is blocks[i] for i in kept)
        if name in seen:
            places = [interval.first for interval in result.variants[name].plan]
            assert all(seen[name][0][i] is now[i] for i in places), "a student was loaded again"
            assert torch.equal(seen[name][1], velocity(pipeline))
        seen[name] = now, velocity(pipeline)
    assert not torch.equal(seen["all"][1], teachers) and not torch.equal(seen["all"][1], seen["ends"][1])
    result.switch(pipeline, "teacher")
    assert all(a is b for a, b in zip(blocks, pipeline.transformer.transformer_blocks, strict=True))
    assert {name: p.data_ptr() for name, p in pipeline.transformer.named_parameters()} == storages
    assert torch.equal(velocity(pipeline), teachers)


def test_a_variant_runs_its_students_where_their_intervals_were(result, pipeline):
    """Against the blocks called one after the other by hand."""
    from ppcl.models import embed, head, run_blocks

    result.switch(pipeline, "teacher")
    model, inputs = pipeline.transformer, tiny.inputs(pipeline.transformer)
    blocks = list(model.transformer_blocks)
    student = result._switch.module(made_result.INTERVALS[1], "cpu", torch.float32)
    with torch.no_grad():
        streams, context = embed(model, inputs)
        streams = run_blocks(result.teacher.adapter, blocks[:2], streams, context)
        streams = student.streams(streams, context)
        streams = run_blocks(result.teacher.adapter, blocks[4:], streams, context)
        by_hand = head(model, streams, inputs)
    result.switch(pipeline, [(2, 3)])
    assert torch.equal(velocity(pipeline), by_hand)
    result.switch(pipeline, "teacher")


def test_parameters_told_are_those_of_the_plugged_model(result, pipeline):
    for name, variant in result.variants.items():
        result.switch(pipeline, name)
        assert variant.parameters == sum(p.numel() for p in pipeline.transformer.parameters())
    result.switch(pipeline, "teacher")


def test_names_and_intervals_choose_the_same_and_the_pipeline_draws(result):
    pictures = {}
    for choice in ("ends", "0-1,4-5", ((0, 1), (4, 5)), "teacher"):
        pipeline = result.pipeline(choice)
        sampling = result.sampling
        pictures[str(choice)] = pipeline(
            "a photo of a red circle",
            num_inference_steps=sampling.steps,
            height=sampling.height,
            width=sampling.width,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    assert np.array_equal(pictures["ends"], pictures["0-1,4-5"])
    assert np.array_equal(pictures["ends"], pictures["((0, 1), (4, 5))"])
    assert not np.array_equal(pictures["ends"], pictures["teacher"])


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            "p10",
            "no variant 'p10'; there are teacher, p90, p75, all, ends, and plans written as .* with commas between, "
            "of 0-1, 2-3, 4-5",
        ),
        ("0-2", "there is no replacement 0-2; there are 0-1, 2-3, 4-5"),
        ("0-1,0-1", "overlap"),
        ("3-9", "does not lie within one block list"),
    ],
)
def test_a_choice_that_is_not_there_leaves_the_pipeline_as_it_was(result, pipeline, choice, sentence):
    result.switch(pipeline, "p90")
    before = list(pipeline.transformer.transformer_blocks)
    with pytest.raises(UserError, match=sentence):
        result.switch(pipeline, choice)
    assert all(a is b for a, b in zip(before, pipeline.transformer.transformer_blocks, strict=True))


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def test_a_tampered_student_is_refused(copy):
    student = copy / "students" / "02-03.safetensors"
    content = bytearray(student.read_bytes())
    content[-1] ^= 1
    student.write_bytes(content)
    with pytest.raises(UserError, match="02-03.safetensors is damaged or missing .*sha256"):
        Result(copy)


class Explosive:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(copy, tmp_path):
    """Also where the manifest vouches for it."""
    ran = tmp_path / "ran"
    pickled = pickle.dumps({"weight": Explosive(ran)})
    (copy / "students" / "02-03.safetensors").write_bytes(pickled)
    Artifacts(copy).commit("students", "0")
    result = Result(copy)
    with pytest.raises(UserError, match="02-03.safetensors cannot be read as safetensors"):
        result.pipeline("2-3")
    assert not ran.exists()
    pickle.loads(pickled)
    assert ran.exists(), "the test's own pickle does nothing"


def test_a_student_the_manifest_does_not_name_is_not_used(copy):
    shutil.copy(copy / "students" / "02-03.safetensors", copy / "students" / "01-03.safetensors")
    with pytest.raises(UserError, match="no replacement 1-3"):
        Result(copy).variant("1-3")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, words: tensors.pop("block.img_mod.1.weight"),
        lambda tensors, words: tensors.update({"block.img_mod.1.weight": torch.zeros(3, 3)}),
        lambda tensors, words: tensors.update({"affine.txt.weight": torch.zeros(3)}),
        lambda tensors, words: words.pop("source"),
        lambda tensors, words: words.update(source="77"),
    ],
    ids=["a tensor less", "another shape", "a map that is none", "no source", "a source that is no block"],
)
def test_a_student_that_does_not_fit_the_teacher_is_refused(copy, change):
    path = copy / "students" / "02-03.safetensors"
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    tensors = load_file(path)
    change(tensors, words)
    save_file(tensors, path, words)
    with pytest.raises(UserError, match="02-03.safetensors does not fit the teacher"):
        load_replacement(path, Teacher(json.loads((copy / "manifest.json").read_text())["job"]["teacher"]))


def test_a_student_comes_back_from_its_file_as_it_was(tmp_path, teacher_folder):
    teacher = Teacher(teacher_folder)
    made = made_result.student(teacher, made_result.INTERVALS[0], affine=True)
    save_replacement(made, made_result.INTERVALS[0], teacher.adapter, tmp_path / "00-01.safetensors")
    read = load_replacement(tmp_path / "00-01.safetensors", teacher)
    assert (read.interval, read.source) == (made.interval, made.source)
    assert made.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in made.state_dict().items())
    half = load_replacement(tmp_path / "00-01.safetensors", teacher, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in half.parameters()
    )


def test_a_size_that_the_pipeline_rounds_is_told_as_it_is_drawn(tmp_path):
    """Of a teacher that draws multiples of 16: results that earlier versions made may have any multiple of 8."""
    folder = tiny.qwen_pipeline(tmp_path / "teacher")
    config = json.loads((folder / "vae" / "config.json").read_text())
    deeper = config | {"dim_mult": [1] * 4, "temperal_downsample": [False] * 3}
    AutoencoderKLQwenImage.from_config(deeper).save_pretrained(folder / "vae")
    path = made_result.result(tmp_path / "result", folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"sampling": config["sampling"] | {"height": 56, "width": 40}}))
    result = Result(path.parent)
    assert (result.sampling.height, result.sampling.width) == (48, 32)
    pipeline = result.pipeline()
    rounded, own = (
        pipeline("a red circle", num_inference_steps=1, height=h, width=w, generator=torch.Generator().manual_seed(0))
        for h, w in ((56, 40), (48, 32))
    )
    assert rounded.images[0].size == (32, 48) and rounded.images[0].tobytes() == own.images[0].tobytes()


def test_the_jobs_sampling_is_told_or_asked_for(copy):
    sampling = Result(copy).sampling
    assert (sampling.steps, sampling.height, sampling.width, sampling.arguments) == (2, 32, 32, {})
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_another_version": 1}))
    assert Result(copy).sampling == sampling
    for sensitivity in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        sensitivity(copy / "config.json")
        with pytest.raises(UserError, match="config.json is damaged or missing"):
            Result(copy).sampling  # noqa: B018


def test_a_missing_stage_and_another_teacher_are_refused(copy, tmp_path):
    other = tiny.qwen_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the teacher of this result"):
        Result(copy, teacher=other)
    with pytest.raises(UserError, match="/gone does not exist any more; give its new path"):
        Result(copy, teacher="/gone")
    Artifacts(copy).drop_record("variants")
    with pytest.raises(UserError, match="has no variants yet"):
        Result(copy)


def test_a_result_runs_and_switches_in_less_memory(root, result, pipeline):
    small = Result(root, memory={"offload": "group"})
    moved = small.pipeline("ends")
    for name in ("ends", "all", "teacher"):
        result.switch(pipeline, name)
        small.switch(moved, name)
        assert torch.allclose(velocity(moved), velocity(pipeline), atol=1e-5)
    result.switch(pipeline, "teacher")


def test_a_key_of_memory_that_is_none_is_refused(root):
    with pytest.raises(UserError, match="memory: unknown key offlod; the nearest is offload; known here: offload,"):
        Result(root, memory={"offlod": "group"})
