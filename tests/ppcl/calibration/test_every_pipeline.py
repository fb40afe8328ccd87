"""Prompts and samples of every pipeline that a job can calibrate, recorded from a tiny one."""

import inspect

import pytest
import torch

from ppcl.calibration.dataset import CalibrationSet, write_call, write_embeddings, write_splits, write_states
from ppcl.calibration.encoding import EncodedPrompts, encode
from ppcl.calibration.trajectory_recorder import StateSettings, record
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models import adapter_of, check_calibration, records
from tests import tiny_pipelines

# A pipeline without a text encoder has no prompts to encode.
CALIBRATED = [
    name
    for record_ in records()
    for name in record_.pipelines
    if name in tiny_pipelines.PIPELINES
    and name not in record_.uncalibrated
    and "prompt_embeds" not in tiny_pipelines.PIPELINES[name][1]
]


@pytest.mark.parametrize("name", CALIBRATED)
@torch.no_grad()
def test_recorded_samples_are_the_calls_of_the_stock_pipeline(tmp_path, name):
    make, arguments = tiny_pipelines.PIPELINES[name]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    adapter, model = adapter_of(pipeline.transformer), pipeline.transformer
    accepted = inspect.signature(pipeline.__call__).parameters
    extra = {
        key: arguments[key]
        for key in ("num_frames", "max_sequence_length", "enable_prompt_rewrite")
        if key in arguments
    }
    sampling = Sampling(
        steps=3,
        height=arguments["height"],
        width=arguments["width"],
        arguments=extra | ({"guidance_scale": 1.0} if "guidance_scale" in accepted else {}),
    )
    calls = []
    hook = model.register_forward_hook(
        lambda _, args, named, output: calls.append((named[adapter.latents], output[0])), with_kwargs=True
    )
    embeddings = encode(pipeline, adapter, ["a red circle", "a blue square"], sampling)
    states, call = record(pipeline, adapter, EncodedPrompts([0, 1], embeddings), StateSettings(sampling, 2, seed=5))
    hook.remove()
    assert len(states) == 4
    write_embeddings(tmp_path / "prompts" / "0.parquet", [0, 1], ["a", "b"], embeddings)
    write_states(tmp_path / "states" / "0.parquet", states, call, dropped=0)
    write_call(tmp_path, adapter.transformer, call)
    write_splits(tmp_path, [0], [])
    samples = CalibrationSet(tmp_path)
    batch = samples.batch([*samples.ids("train"), *samples.ids("validation")])
    velocity = model(**batch, return_dict=False)[0]
    for row, latents in enumerate(batch[adapter.latents]):
        (stock,) = [o[i] for given, o in calls for i in range(2) if torch.equal(given[i], latents)]
        torch.testing.assert_close(velocity[row], stock, rtol=1e-4, atol=1e-5)


def test_a_job_of_a_pipeline_that_cannot_be_calibrated_is_refused_in_one_sentence():
    refused = [(record_, name) for record_ in records() for name in record_.uncalibrated]
    assert refused
    for record_, name in refused:
        assert name in record_.pipelines
        with pytest.raises(UserError, match=f"cannot calibrate a {name}: .*ppcl architectures"):
            check_calibration(record_, name)
    check_calibration(adapter_of("FluxTransformer2DModel"), "FluxPipeline")
