"""Small stock pipelines of every family, and pipelines shared by many images."""

import time

import torch

from serve.engine.shared_pipeline import BatchLimits, SharedPipeline
from tests.ppcl.calibration.test_families import embedding, flux_pipeline, sd3_pipeline

GATHER = 5.0


def share(pipeline, switch=lambda transformer, plan, lora: None, rows=8, gather=GATHER):
    pipeline.set_progress_bar_config(disable=True)
    batches, begun = [], []

    def switch_late(transformer, plan, lora):
        # The first batch takes as long as the other threads need to come.
        time.sleep(0 if begun else 0.5)
        begun.append(plan)
        switch(transformer, plan, lora)

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


def calls_of(family, qwen):
    """A family's stock pipeline, and calls of it that differ in all that a client can set."""
    return {"qwen": lambda: qwen_calls(qwen), "flux": flux_calls, "sd3": sd3_calls}[family]()


def latents(pipeline, call):
    seeded = call | {"generator": torch.Generator().manual_seed(call.get("generator", 0))}
    return pipeline(**seeded, output_type="latent").images
