"""Sizing: the published numbers of the published models, and what real ranks hold and send."""

import json

import torch
from torch.utils._pytree import tree_leaves

from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.sizing import Model, layouts
from ppcl.sizing.memory import intervals
from ppcl.training.captured import CaptureSpec
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage
from ppcl.training.teacher_segment import TeacherSegment
from tests import ranks, tiny

GPUS = (1, 2, 4, 8, 16, 32, 64)
SIZE, BATCH, LENGTH = 64, 8, 2


def test_more_gpus_hold_less_each_and_send_less_than_fsdp_would_gather(models):
    for model in models:
        rows = list(layouts(model, intervals(model, 4), 16, GPUS))
        assert [row.gpus for row in rows] == list(GPUS)
        memory = [row.memory for row in rows]
        assert memory == sorted(memory, reverse=True) and memory[-1] < memory[0] / 4
        assert all(row.sent + row.reduced < row.fsdp for row in rows[1:])


def _measure(folder, out):
    """What one rank of two holds after a step, and sent, in bytes."""
    teacher, mesh = Teacher(folder), ParallelDims.join(2, 1)
    plan = intervals(_model(folder), LENGTH)
    count = len(teacher.adapter.blocks(teacher.empty_transformer()))
    blocks = segment_of(mesh.pp_rank, 2, count, plan, "students")
    segment = TeacherSegment(teacher, blocks, plan, "cpu", torch.bfloat16)
    pipeline_stage = PipelineStage(mesh.pp_rank, 2, mesh.rank)
    objectives = [
        new_objective(TeacherBlocks(segment.adapter, segment.transformer, segment.blocks, count), e, Distillation())
        for e in segment.plan
    ]
    trainees = [Trainee(objective, Distillation(precision="bfloat16"), mesh) for objective in objectives]
    inputs = tiny.inputs(tiny.qwen_transformer(), BATCH)
    text = inputs["encoder_hidden_states"][:1].expand(BATCH, -1, -1).repeat(1, 8, 1)
    inputs |= {
        "hidden_states": torch.randn(BATCH, (SIZE // 16) ** 2, inputs["hidden_states"].shape[-1]).bfloat16(),
        "encoder_hidden_states": text.bfloat16(),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, SIZE // 16, SIZE // 16)]] * BATCH,
    }
    wanted = CaptureSpec()
    for trainee in trainees:
        wanted |= trainee.objective.capture
    seen = segment.run(inputs, pipeline_stage, wanted)
    most = 0
    for trainee in trainees:
        shared = [*trainee.state.parameters.values(), *filter(torch.is_tensor, tree_leaves(seen.context))]
        own, kept, held = {x.untyped_storage().data_ptr() for x in shared}, {}, []

        def keep(x, own=own, kept=kept, held=held):
            if x.untyped_storage().data_ptr() not in own:
                held.append(x)
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            trainee.train_step(seen, bfloat16=True)
        most = max(most, sum(kept.values()))
    pipeline_stage.flush()
    mesh.barrier()
    students = 0
    for trainee in trainees:
        for p in trainee.state.parameters.values():
            state = trainee.state.optimizer.state[p]
            students += p.nbytes + p.grad.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    streams = sum(x.nbytes for s in seen.boundaries.values() for x in s if x is not None)
    measured = {
        "teacher": sum(p.nbytes for p in segment.transformer.parameters()),
        "students": students,
        "activations": most,
        "streams": streams,
        "sent": pipeline_stage.bytes_sent,
    }
    (out / f"{mesh.rank}.json").write_text(json.dumps(measured))


def _model(folder):
    teacher = Teacher(folder)
    return Model.of("tiny", teacher.adapter.transformer, teacher.config(), 7 * 8, SIZE, SIZE)


def test_two_real_ranks_hold_and_send_what_is_computed(teacher_folder, tmp_path):
    ranks.run(2, _measure, teacher_folder, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    model = _model(teacher_folder)
    (row,) = layouts(model, intervals(model, LENGTH), BATCH, [2])
    measured = max(found, key=lambda f: f["teacher"] + f["students"])
    assert measured["teacher"] == row.teacher
    assert measured["students"] == row.students
    assert found[0]["sent"] == row.sent == BATCH * model.stream_bytes and found[1]["sent"] == 0
    # Beside the student's own, autograd keeps what the loss needs.
    assert row.activations <= measured["activations"] < 1.25 * row.activations
    # A rank that sends has two sends under way, too.
    assert row.streams in (measured["streams"], measured["streams"] + 2 * row.sent)
