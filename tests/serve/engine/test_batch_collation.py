"""Stock pipelines of every family, many at once on one transformer: each image is the one it is alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from serve.engine.batcher import Cancelled, Ticket
from serve.engine.generation import (
    GenerationTask,
    ImageGenerator,
    _CleanLatentsRecorder,
    _PreviewRequest,
    calls_per_step,
)
from serve.engine.shared_pipeline import BatchLimits, SharedPipeline, WorkloadKey
from tests import made_result
from tests.ppcl.calibration.test_families import embedding, flux_pipeline, sd3_pipeline

GATHER = 5.0


def share(pipeline, switch=lambda transformer, plan: None, rows=8, gather=GATHER):
    pipeline.set_progress_bar_config(disable=True)
    batches, begun = [], []

    def switch_late(transformer, plan):
        # The first batch takes as long as the other threads need to come.
        time.sleep(0 if begun else 0.5)
        begun.append(plan)
        switch(transformer, plan)

    shared = SharedPipeline(
        pipeline,
        switch_late,
        BatchLimits(rows, gather, 2**20),
        lambda group, rows, seconds: batches.append((group[0].plan, rows)),
    )
    return shared, batches


def embedded(seed, length=6):
    e = embedding(seed)
    return {
        "prompt_embeds": e["encoder_hidden_states"][None, :length],
        "pooled_prompt_embeds": e["pooled_projections"][None],
    }


def negative(seed):
    return {f"negative_{name}": value for name, value in embedded(seed).items()}


@pytest.fixture(scope="module")
def qwen(teacher_folder):
    return Teacher(teacher_folder).pipeline()


def qwen_calls(pipeline):
    call = {"height": 32, "width": 32, "generator": 7}
    words = [
        "red",
        "a photo of a red circle",
        "a photo of two blue squares and one green cross, left of a black triangle",
        "x",
    ]
    plain = [{"prompt": text, "num_inference_steps": 3 + n, "generator": n} for n, text in enumerate(words)]
    guided = [
        {"prompt": words[n], "negative_prompt": text, "true_cfg_scale": scale, "num_inference_steps": 4}
        for n, (text, scale) in enumerate([(" ", 4.0), ("a photo of a blue square", 2.0)])
    ]
    other_size = [{"prompt": words[1], "num_inference_steps": 4, "width": 48}]
    return pipeline, [call | own for own in plain + guided + other_size]


def flux_calls():
    call = {"height": 16, "width": 16}
    plain = [embedded(n) | {"guidance_scale": 1.5 + n, "num_inference_steps": 3 + n, "generator": n} for n in range(3)]
    guided = [embedded(5) | negative(6) | {"true_cfg_scale": 3.0, "num_inference_steps": 4, "generator": 5}]
    short = [embedded(7, length=4) | {"num_inference_steps": 4, "generator": 8}]
    return flux_pipeline(), [call | own for own in plain + guided + short]


def sd3_calls():
    call = {"height": 16, "width": 16}
    guided = [
        embedded(n) | negative(9) | {"guidance_scale": 2.0 + n, "num_inference_steps": 3 + n, "generator": n}
        for n in range(3)
    ]
    plain = [embedded(n) | {"guidance_scale": 1.0, "num_inference_steps": 3 + n, "generator": 9 + n} for n in range(2)]
    return sd3_pipeline(), [call | own for own in guided + plain]


def latents(pipeline, call):
    seeded = call | {"generator": torch.Generator().manual_seed(call.get("generator", 0))}
    return pipeline(**seeded, output_type="latent").images


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


@pytest.mark.parametrize("family", ["qwen", "flux", "sd3"])
def test_batched_is_serial(family, qwen):
    """Steps, lengths of prompts, guidance, negative prompts and sizes all mixed."""
    pipeline, calls = {"qwen": lambda: qwen_calls(qwen), "flux": flux_calls, "sd3": sd3_calls}[family]()
    shared, batches = share(pipeline)
    alone = [latents(pipeline, call) for call in calls]
    try:
        at_once = together(shared, calls, [()] * len(calls))
    finally:
        shared.close()
    for one, other in zip(at_once, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert max(rows for _, rows in batches) >= 3, "nothing was batched"
    assert len({tensor.flatten()[0].item() for tensor in alone}) == len(calls), "the calls are alike"


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


@pytest.fixture
def generator(qwen):
    made = ImageGenerator(share(qwen)[0])
    yield made
    made.close()


TASK = GenerationTask((), "a photo of a red circle", 32, 32, 6, seed=3)


def with_changes(**changes):
    return GenerationTask(**(vars(TASK) | changes))


def test_a_picture_is_that_of_the_stock_pipeline(generator, qwen):
    generated = generator.generate(TASK, Ticket())
    stock = qwen(
        "a photo of a red circle",
        height=32,
        width=32,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
    )
    assert np.array_equal(generated.image, np.asarray(stock.images[0]))
    assert set(generated.seconds) == {"encoding", "denoising", "decoding"} and min(generated.seconds.values()) > 0


def test_a_picture_that_is_cancelled_ends_at_its_next_step(generator):
    ticket, steps = Ticket(), []

    def stepped(step):
        steps.append(step)
        if step == 2:
            ticket.cancelled.set()

    with pytest.raises(Cancelled):
        generator.generate(TASK, ticket, stepped)
    assert steps == [1, 2]
    assert generator.generate(TASK, Ticket()).image.shape == (32, 32, 3)


def test_the_clean_latents_of_the_last_step_are_the_result(qwen):
    """`x_t - σ_t v` is exact where the next σ is zero; guidance included."""
    scheduler = qwen.scheduler
    for guidance in ({}, {"negative_prompt": " ", "true_cfg_scale": 3.0}):
        shared, _ = share(qwen)
        pipeline = shared.copy(WorkloadKey((), 1024), Ticket())
        recorder = _CleanLatentsRecorder(pipeline.scheduler)
        result = latents(pipeline, {"prompt": "red", "height": 32, "width": 32, "num_inference_steps": 4, **guidance})
        shared.close()
        torch.testing.assert_close(recorder.latents, result, rtol=1e-5, atol=1e-5)
    assert qwen.scheduler is scheduler


@pytest.mark.parametrize(
    ("steps", "previews", "after"), [(6, 2, [2, 4]), (6, 1, [3]), (2, 3, [1]), (1, 3, []), (6, 0, [])]
)
def test_previews_come_from_another_thread_in_order_and_before_the_end(generator, steps, previews, after):
    seen = []

    def previewed(number, step, image):
        assert image.shape == (32, 32, 3) and threading.current_thread().name.startswith("previews")
        seen.append((number, step))

    generator.generate(with_changes(steps=steps, previews=previews), Ticket(), on_preview=previewed)
    assert seen == list(enumerate(after))


def test_a_preview_shows_what_the_latents_decode_to(generator, qwen):
    """The final latents, previewed, are the final image."""
    call = {"prompt": TASK.prompt, "height": 32, "width": 32, "num_inference_steps": 6, "generator": 3}
    seen = []
    preview = _PreviewRequest(latents(qwen, call), 0, 6, lambda *arguments: seen.append(arguments))
    generator._preview(TASK, Ticket(), preview)
    assert np.array_equal(seen[0][2], generator.generate(TASK, Ticket()).image)


def test_pictures_are_decoded_in_batches_no_larger_than_told(qwen):
    for pixels, most in ((2 * 32 * 32, 2), (1, 1)):
        shared = SharedPipeline(
            qwen, lambda transformer, plan: None, BatchLimits(8, GATHER, pixels), lambda *batch: None
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
                        generator.generate, [with_changes(seed=seed) for seed in range(5)], [Ticket() for _ in range(5)]
                    )
                )
        finally:
            generator.close()
            del shared.stock.vae.decode
        assert sum(sizes) == 5 and max(sizes) <= most


def test_rows_a_step_takes_are_told_by_how_the_pipeline_guides(qwen):
    flux, sd3 = flux_pipeline().__call__, sd3_pipeline().__call__
    asked = [
        (qwen.__call__, {}, 1),
        (qwen.__call__, {"negative_prompt": " "}, 2),
        (qwen.__call__, {"negative_prompt": " ", "true_cfg_scale": 1}, 1),
        (flux, {}, 1),
        (flux, {"true_cfg_scale": 2.0, "negative_prompt": ""}, 2),
        (flux, {"guidance_scale": 9.0}, 1),
        (sd3, {}, 2),
        (sd3, {"guidance_scale": 1.0}, 1),
    ]
    assert [calls_per_step(call, arguments) for call, arguments, _ in asked] == [rows for _, _, rows in asked]
