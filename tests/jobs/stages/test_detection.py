"""Detection on a real Ray: rows of the similarity tables as tasks give what one process gives."""

import json

from jobs.stages import detection
from ppcl.config.schema import Config, Detection, Width
from ppcl.storage.manifest import StageFiles
from tests.ppcl.detection.test_detect import bent, write_stack
from tests.stage_context import context

BLOCKS = 6


def test_tasks_on_ray_make_the_tables_that_one_process_makes(tmp_path, monkeypatch, ray_cluster, teacher_folder):
    (tmp_path / "probes").mkdir()
    write_stack(tmp_path / "probes", [bent(seed, 0.5) for seed in range(BLOCKS)])
    files = StageFiles(tmp_path / "probes", tuple(sorted(path.name for path in (tmp_path / "probes").iterdir())))
    config = Config(teacher=teacher_folder, prompts=tmp_path / "prompts.txt")
    tables, counts = {}, []
    for name, least in (("here", float("inf")), ("tasks", 0.0)):
        monkeypatch.setattr(detection, "_WORTH_A_TASK", least)
        run = detection._RayTasks(context(config, tmp_path / "detection", probes=tmp_path / "probes"))
        tables[name] = detection.similarity_tables(
            files.folder, [range(BLOCKS)], Detection(), Width(), lambda *done: counts.append(done), run
        )
    assert tables["here"] == tables["tasks"]
    # Both streams, and the text stream against itself.
    assert counts[-1] == (3 * BLOCKS, 3 * BLOCKS)
    assert json.dumps(tables["tasks"])
