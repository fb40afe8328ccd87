"""What a user is told of checkpoints that are damaged."""

from pathlib import Path

from jobs.runtime.checkpoints import damage_note, drop_damaged_checkpoints


def test_a_step_and_a_file_are_told_by_what_is_trained_again(tmp_path):
    told = "finetuning: its checkpoint of step 12 was damaged; trained again from the one before, or the start"
    assert damage_note("finetuning", Path("checkpoints/key/step-00000012")) == told
    assert damage_note("finetuning", Path("checkpoints/key/step-00000012/state.safetensors")) == told
    damaged = tmp_path / "new" / "01-02.safetensors"
    assert drop_damaged_checkpoints("students", damaged.parent) == [] and damaged.parent.is_dir()
    damaged.write_bytes(b"half")
    told = "students: the checkpoint of 01-02 was damaged; trained again from the start"
    assert drop_damaged_checkpoints("students", damaged.parent) == [told] and not damaged.exists()
