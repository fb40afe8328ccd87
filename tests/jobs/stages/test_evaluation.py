"""The evaluation stage in this process: what it reports is of prompts that nothing was fitted or chosen on."""

import json

import pytest
import torch

from jobs.stages import evaluation
from ppcl.calibration.dataset import CalibrationSet, write_call, write_embeddings, write_splits, write_states
from ppcl.calibration.trajectory_recorder import Call, State
from ppcl.config.schema import Config
from ppcl.demo import text
from tests import made_result, tiny
from tests.one_process import stages_in_this_process
from tests.stage_context import context

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("cat", "cow", "dog")]
VALIDATION, TEST = [2, 5], [1, 4, 7]
TEST_PROMPTS = [PROMPTS[i] for i in TEST]
SPLITS = {"train": 4, "validation": 2, "test": 3}


@pytest.fixture(scope="module")
def result(tmp_path_factory, teacher_folder):
    """A result with a calibration set of two random states a prompt."""
    root = made_result.result(tmp_path_factory.mktemp("result"), teacher_folder)
    folder, generator = root / "calibration", torch.Generator().manual_seed(0)
    embeddings = [{"encoder_hidden_states": torch.randn(4, text.WIDTH, generator=generator)} for _ in PROMPTS]
    write_embeddings(folder / "prompts" / "0.parquet", range(len(PROMPTS)), PROMPTS, embeddings)
    call = Call({"img_shapes": [(1, 4, 4)]}, {})
    latents = [torch.randn(16, 4 * tiny.Z_DIM, generator=generator) for _ in range(2 * len(PROMPTS))]
    states = [State(2 * i + s, i, i, 0.3 + 0.4 * s, latents[2 * i + s]) for i in range(len(PROMPTS)) for s in (0, 1)]
    write_states(folder / "states" / "0.parquet", states, call, dropped=0)
    write_call(folder, "QwenImageTransformer2DModel", call)
    write_splits(folder, VALIDATION, TEST)
    return root


def evaluate(result, teacher_folder, folder, **settings):
    """The stage's record, its info, and the ids of the samples that it read."""
    config = Config(
        teacher=teacher_folder,
        prompts="prompts.txt",
        device="cpu",
        sampling={"steps": 2, "height": 32, "width": 32},
        evaluation={"batch_size": 4} | settings,
    )
    read, batch = set(), CalibrationSet.batch

    def recorded(self, ids, *arguments):
        read.update(int(i) for i in ids)
        return batch(self, ids, *arguments)

    inputs = {name: result / name for name in ("calibration", "students", "variants")}
    with stages_in_this_process("evaluation"), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(CalibrationSet, "batch", recorded)
        info = evaluation.run(context(config, folder, **inputs))
    return json.loads((folder / "evaluation.json").read_text()), info, read


def test_velocity_errors_and_images_are_of_the_split_test_alone(result, teacher_folder, tmp_path):
    record, info, read = evaluate(result, teacher_folder, tmp_path)
    assert read == {2 * i + slot for i in TEST for slot in (0, 1)}
    assert [prompt["text"] for prompt in record["prompts"]] == TEST_PROMPTS
    assert record["splits"] == SPLITS | {"seen_prompts": 0} and info["notes"] == []
    assert record["variants"]["all"]["velocity_error"] > record["variants"]["teacher"]["velocity_error"] == 0


def test_given_prompts_that_things_were_fitted_or_chosen_on_are_counted(result, teacher_folder, tmp_path):
    path = tmp_path / "test.txt"
    path.write_text("\n".join([PROMPTS[0], PROMPTS[2], PROMPTS[1], "a grey horse"]))
    record, info, _ = evaluate(result, teacher_folder, tmp_path / "evaluation", prompts=path)
    assert record["splits"] == SPLITS | {"seen_prompts": 2}
    assert info["notes"] == [
        "evaluation: 2 of 4 test prompts are also among the calibration prompts that things were fitted or chosen on"
    ]
