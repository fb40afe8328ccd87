"""What the calibration set says of itself in the end: its split, its counts, the arguments that all samples share."""

import json

import pytest
import torch

from ppcl.calibration import dataset
from ppcl.calibration.splits import hashes, split_prompts
from ppcl.calibration.trajectory_recorder import NEGATIVE, Call, State
from ppcl.errors import UserError

CALL = Call({"guidance": 1.0}, {})
TEXTS = [f"prompt {i}" for i in range(8)]


def write(folder, sampled, dropped=0, texts=TEXTS):
    """Prompts in files of three, the negative one beside them; two states of each of those that are `sampled`."""
    embedding = {"encoder_hidden_states": torch.zeros(2, 4)}
    dataset.write_embeddings(folder / "prompts" / "negative.parquet", [NEGATIVE], [""], [embedding])
    for start in range(0, len(texts), 3):
        ids = range(len(texts))[start : start + 3]
        dataset.write_embeddings(
            folder / "prompts" / f"{start}.parquet", ids, texts[start : start + 3], [embedding] * len(ids)
        )
        states = [State(2 * i + slot, i, i, 0.5, torch.zeros(3)) for i in ids if i in sampled for slot in (0, 1)]
        dataset.write_states(folder / "states" / f"{start}.parquet", states, CALL if states else None, dropped)


def finish(folder, validation=0.25, test=0.25):
    return dataset.finish(folder, "QwenImageTransformer2DModel", seed=3, validation=validation, test=test)


def test_prompts_with_states_are_split_by_the_hash_of_their_text(tmp_path):
    sampled = [0, 1, 3, 6, 7]
    write(tmp_path, sampled, dropped=1)
    counts = {"train_prompts": 2, "validation_prompts": 2, "test_prompts": 1}
    assert finish(tmp_path, 0.4, 0.2) == counts | {"samples": 10, "dropped": 3}
    splits = split_prompts(hashes([TEXTS[i] for i in sampled], seed=3), 0.4, 0.2)
    expected = {split: [sampled[i] for i in rows] for split, rows in splits.items()}
    assert json.loads((tmp_path / "splits.json").read_text()) == {s: expected[s] for s in ("validation", "test")}
    samples = dataset.CalibrationSet(tmp_path)
    assert samples.call == CALL
    assert {split: [i for i, _ in samples.prompts(split)] for split in expected} == expected


def test_a_set_of_the_previous_version_reports_on_its_held_out_prompts(tmp_path):
    write(tmp_path, [0, 1, 3])
    finish(tmp_path)
    (tmp_path / "splits.json").unlink()
    with pytest.raises(UserError, match="no complete calibration set"):
        dataset.CalibrationSet(tmp_path)
    (tmp_path / "held_out.json").write_text("[1]")
    samples = dataset.CalibrationSet(tmp_path)
    assert samples.prompt_ids("train").tolist() == [0, 3]
    assert samples.prompt_ids("validation").tolist() == samples.prompt_ids("test").tolist() == [1]


def test_states_of_fewer_prompts_than_splits_are_refused(tmp_path):
    write(tmp_path / "none", [])
    with pytest.raises(UserError, match="all states of the teacher are NaN or infinite"):
        finish(tmp_path / "none")
    write(tmp_path / "one", [4])
    with pytest.raises(UserError, match="only 1 different prompt has finite states and at least 3 are needed"):
        finish(tmp_path / "one")
    write(tmp_path / "same", [0, 1, 2], texts=["a circle", "a circle", "a cross"])
    with pytest.raises(UserError, match="only 2 different prompts have finite states and at least 3 are needed"):
        finish(tmp_path / "same")
