"""Stock pipelines of every family, many at once on one transformer: each image is the one it is alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from serve.engine.batcher import Ticket
from serve.engine.generation import GenerationTask, ImageGenerator
from serve.engine.shared_pipeline import BatchLimits, SharedPipeline, WorkloadKey
from tests import made_result
from tests.schedulers import CASES, WORKING
from tests.serve.engine.families import GATHER, calls_of, latents, share


def together(shared, calls, plans):
    """All calls at once, each on a copy of its own."""

    def one(call, plan):
        ticket = Ticket()
        try:
            return latents(shared.copy(WorkloadKey(plan, call["height"] * call["width"]), ticket), call)
        finally:
            shared.denoising.leave(ticket)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls, plans))


def held_to_serial(pipeline, calls, at_least, **sharing):
    """Calls at once give the latents of each alone, which are returned; batches had `at_least` so many rows."""
    shared, batches = share(pipeline, **sharing)
    alone = [latents(pipeline, call) for call in calls]
    try:
        at_once = together(shared, calls, [()] * len(calls))
    finally:
        shared.close()
    for one, other in zip(at_once, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert max(rows for _, rows in batches) >= at_least, "nothing was batched"
    return alone


@pytest.mark.parametrize("family", ["qwen", "flux", "sd3"])
def test_batched_is_serial(family, qwen):
    """Steps, lengths of prompts, guidance, negative prompts and sizes all mixed."""
    pipeline, calls = calls_of(family, qwen)
    alone = held_to_serial(pipeline, calls, at_least=3)
    assert len({tensor.flatten()[0].item() for tensor in alone}) == len(calls), "the calls are alike"


@pytest.mark.parametrize(("name", "family"), [case for case in WORKING if case[0] != "euler"])
def test_batched_is_serial_with_every_scheduler(name, family, qwen, monkeypatch):
    """Requests at different steps share batches, and each has the history of its own scheduler."""
    pipeline, calls = calls_of(family, qwen)
    # Enough steps for a full history.
    calls = [call | {"num_inference_steps": call.get("num_inference_steps", 4) + 3} for call in calls[:4]]
    monkeypatch.setattr(pipeline, "scheduler", CASES[name].scheduler())
    held_to_serial(pipeline, calls, at_least=2, gather=0.5)


def test_pictures_of_different_variants_share_a_transformer(tmp_path, teacher_folder):
    teacher = Teacher(teacher_folder)
    pipeline = teacher.pipeline()
    switch = VariantSwitcher(teacher, files_in(made_result.result(tmp_path / "job", teacher_folder) / "students"))
    plans = [(), made_result.INTERVALS[:1], made_result.INTERVALS, made_result.INTERVALS[1:]]
    plans = [tuple(plan) for plan in plans for _ in range(2)]
    prompts = ["a photo of a red circle", "a photo of a green cross"] * 4
    calls = [
        {"prompt": text, "height": 32, "width": 32, "num_inference_steps": 3, "generator": n}
        for n, text in enumerate(prompts)
    ]
    alone = []
    for call, plan in zip(calls, plans, strict=True):
        switch(pipeline.transformer, plan)
        alone.append(latents(pipeline, call))
    switch(pipeline.transformer, ())
    shared, batches = share(pipeline, switch)
    try:
        at_once = together(shared, calls, plans)
    finally:
        shared.close()
    for one, other in zip(at_once, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert {plan for plan, _ in batches} == set(plans) and max(rows for _, rows in batches) == 2


def test_pictures_are_decoded_in_batches_no_larger_than_told(qwen):
    for pixels, most in ((2 * 32 * 32, 2), (1, 1)):
        shared = SharedPipeline(
            qwen, lambda transformer, plan, lora: None, BatchLimits(8, GATHER, pixels), lambda *batch: None
        )
        sizes, decode = [], qwen.vae.decode
        shared.stock.vae.decode = lambda z, return_dict, decode=decode, sizes=sizes: (
            sizes.append(len(z)) or decode(z, return_dict=return_dict)
        )
        generator = ImageGenerator(shared)
        try:
            with ThreadPoolExecutor(5) as pool:
                list(
                    pool.map(
                        generator.generate,
                        [GenerationTask((), "a photo of a red circle", 32, 32, 6, seed=seed) for seed in range(5)],
                        [Ticket() for _ in range(5)],
                    )
                )
        finally:
            generator.close()
            del shared.stock.vae.decode
        assert sum(sizes) == 5 and max(sizes) <= most
