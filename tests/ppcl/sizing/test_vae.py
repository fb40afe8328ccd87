"""What decoding and encoding images takes, against the bytes of a real run on this CPU."""

import json

import diffusers
import pytest
import torch

from ppcl.config.schema import Config
from ppcl.sizing.device import Device
from ppcl.sizing.job import job_size
from ppcl.sizing.model import TeacherSize, published, whole_pipelines
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.stages import worker_sizes
from ppcl.sizing.vae import VaeMemory
from tests.conftest import REPOSITORY

GB = 1e9
DEMO = json.loads((REPOSITORY / "demo/teacher/vae/config.json").read_text())
LARGER = {**DEMO, "base_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 8}
IMAGES = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "layers_per_block": 2,
}


@pytest.mark.parametrize(
    ("config", "height", "width", "count", "latents"),
    [
        (DEMO, 64, 64, 8, (8, 1, 8, 8)),
        (DEMO, 96, 64, 3, (8, 1, 12, 8)),
        (LARGER, 128, 128, 2, (8, 1, 16, 16)),
        (IMAGES, 128, 64, 4, (4, 32, 16)),
    ],
    ids=["demo", "demo, not square", "larger", "not of videos"],
)
def test_decoding_and_encoding_take_what_is_computed(config, height, width, count, latents):
    vae = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    memory = VaeMemory.of(config, height, width, torch.float32)
    pixels = (3, 1, height, width) if len(latents) == 4 else (3, height, width)
    for call, shape, said in ((vae.decode, latents, memory.decoding), (vae.encode, pixels, memory.encoding)):
        images = torch.randn(count, *shape)
        with torch.no_grad(), PeakMemory() as counted:
            counted.hold(images)
            call(images)
        assert 0.9 < said.of(count) / counted.peak < 1.1
    half = VaeMemory.of(config, height, width, torch.bfloat16)
    assert half.decoding.each * 2 == pytest.approx(memory.decoding.each, abs=2)


@pytest.mark.parametrize("name", whole_pipelines())
def test_the_configurations_of_published_vaes_are_those_of_their_weights(name):
    record = published()[name]
    with torch.device("meta"):
        vae = getattr(diffusers, record["vae"]["_class_name"]).from_config(record["vae"])
    assert sum(p.numel() for p in vae.parameters()) == record["components"]["vae"]


def _evaluator(batch_size, **sections):
    teacher = TeacherSize.named("qwen-image", 1024, 1024)
    config = Config(teacher="t", prompts="p", evaluation={"batch_size": batch_size}, **sections)
    job = job_size(config, teacher, 1000, 4, Device(size=1000 * GB))
    return next(one for one in worker_sizes(job) if (one.stage, one.worker) == ("evaluation", "evaluator"))


def test_an_evaluator_decodes_one_image_of_a_batch_after_the_other():
    # 18 tensors of 96 channels at full size, an image.
    each = 18 * 96 * 1024**2 * 2
    for batch in (1, 4):
        assert _evaluator(batch).device["activations"] == pytest.approx(each, rel=0.01)
    # The transformer's own activations are more.
    assert _evaluator(16).device["activations"] > 1.5 * each


def test_encoding_the_images_of_calibration_is_counted():
    teacher = TeacherSize.named("flux.1-dev", 1024, 1024)
    calibration = {"source": "images", "image_column": "image", "batch_size": 8}
    job = job_size(Config(teacher="t", prompts="p", calibration=calibration), teacher, 1000, 4, Device())
    samplers = [one for one in worker_sizes(job) if (one.stage, one.worker) == ("calibration", "sampler")]
    assert [one.device["activations"] for one in samplers] == [job.vae.encoding.of(8)]
    assert samplers[0].device["activations"] > 8 * 128 * 1024**2 * 2 and not samplers[0].device["teacher"]
