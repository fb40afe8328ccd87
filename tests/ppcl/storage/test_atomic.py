"""Files that appear whole: two writers of one, and what a killed one leaves."""

import multiprocessing
import signal

import pytest

from ppcl.storage.atomic import remove_partials, replacing


def _write(path, letter, times):
    for _ in range(times):
        with replacing(path, durable=False) as partial, open(partial, "w") as file:
            for _ in range(100):
                file.write(letter * 100)
                file.flush()


def test_two_who_write_one_file_at_once_leave_the_whole_content_of_one(tmp_path):
    path = tmp_path / "x"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(path, letter, 50)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {"a" * 10_000, "b" * 10_000}
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_have_names_of_their_own_which_later_code_knows(tmp_path):
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        assert first != second and first.suffix == second.suffix == ".partial" and first.parent == tmp_path
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "x").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def _die(path):
    with replacing(path) as partial:
        partial.write_text("half")
        signal.raise_signal(signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "folder" / "x"
    killed = multiprocessing.get_context("spawn").Process(target=_die, args=(path,))
    killed.start()
    killed.join()
    (left,) = path.parent.iterdir()
    assert left.suffix == ".partial"
    (path.parent / "whole").write_text("whole")
    remove_partials(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["whole"]
