"""What the calibration set says of itself in the end: its split, its counts, the arguments that all samples share."""

import json

import pytest
import torch

from ppcl.calibration import dataset
from ppcl.calibration.seeding import hashes, held_out
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


def finish(folder, share=0.25):
    return dataset.finish(folder, "QwenImageTransformer2DModel", seed=3, share=share)


def test_prompts_with_states_are_split_by_the_hash_of_their_text(tmp_path):
    sampled = [0, 1, 3, 6, 7]
    write(tmp_path, sampled, dropped=1)
    assert finish(tmp_path, 0.4) == {"held_out_prompts": 2, "samples": 10, "dropped": 3}
    expected = [sampled[i] for i in held_out(hashes([TEXTS[i] for i in sampled], seed=3), 0.4)]
    assert json.loads((tmp_path / "held_out.json").read_text()) == expected
    samples = dataset.CalibrationSet(tmp_path)
    assert samples.call == CALL
    assert [i for i, _ in samples.prompts(held_out=True)] == expected


def test_states_of_no_prompt_or_of_one_are_refused(tmp_path):
    write(tmp_path / "none", [])
    with pytest.raises(UserError, match="all states of the teacher are NaN or infinite"):
        finish(tmp_path / "none")
    write(tmp_path / "one", [4])
    with pytest.raises(UserError, match="only 1 prompt has finite states"):
        finish(tmp_path / "one")
    write(tmp_path / "same", [0, 1], texts=["a circle"] * 3)
    with pytest.raises(UserError, match="only 1 prompt has finite states"):
        finish(tmp_path / "same")
