"""What ranks leave of their progress."""

import subprocess
import sys

from jobs.runtime.progress_board import ProgressBoard


def test_a_phase_of_the_ranks_begins_with_a_count_and_losses_of_its_own():
    board = ProgressBoard()
    board.update(5, 10, {"a": 0.5}, None)
    board.update(4, 10, {"b": 0.25}, None)
    assert board.read() == (5, 10, {"a": 0.5, "b": 0.25}, None, None)
    board.update(1, 62, {}, "measuring plans")
    assert board.read() == (1, 62, {}, "measuring plans", None)


def test_the_boards_process_does_not_import_torch():
    said = "import sys, jobs.runtime.progress_board; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said]).returncode == 0
