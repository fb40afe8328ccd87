"""States of FLUX.1 and Stable Diffusion 3.5, whose pipelines call their transformers in ways of their own."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image

from ppcl.calibration.dataset import CalibrationSet, write_call, write_embeddings, write_splits, write_states
from ppcl.calibration.encoding import EncodedPrompts, encode
from ppcl.calibration.noised_images import noise_images
from ppcl.calibration.seeding import generator, strata
from ppcl.calibration.trajectory_recorder import NEGATIVE, StateSettings, record
from ppcl.config.schema import Sampling
from ppcl.models import adapter_of
from tests import tiny

KEPT = 2


def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.1,
    ).eval()


def flux_pipeline():
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        transformer=tiny.flux_transformer(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def sd3_pipeline():
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        transformer=tiny.sd3_transformer(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def embedding(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(6, 24, generator=g),
        "pooled_projections": torch.randn(20, generator=g),
    }


# FLUX.1 guides by an embedded scale and, where asked, a second call; SD3 by a doubled batch.
CASES = {
    "flux": (flux_pipeline, {"guidance_scale": 2.5}, False),
    "flux guided": (flux_pipeline, {"guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": ""}, True),
    "sd3": (sd3_pipeline, {"guidance_scale": 1.0}, False),
    "sd3 guided": (sd3_pipeline, {"guidance_scale": 4.0}, True),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_stored_states_give_the_outputs_of_the_stock_calls(tmp_path, case):
    make, arguments, guided = CASES[case]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    adapter = adapter_of(pipeline.transformer)
    embeddings, negative = [embedding(0), embedding(1), embedding(2)], embedding(3)
    outputs = []

    def look(module, args, arguments, output):
        outputs.extend(
            zip(
                arguments["timestep"].tolist(),
                arguments["encoder_hidden_states"],
                arguments["hidden_states"],
                output[0],
            )
        )

    hook = pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    sampling = Sampling(steps=4, height=16, width=16, arguments=arguments)
    states, call = record(
        pipeline, adapter, EncodedPrompts([0, 1, 2], embeddings, negative), StateSettings(sampling, KEPT, seed=5)
    )
    hook.remove()
    assert len({s.sample_id for s in states}) == len(states) == 3 * KEPT * (2 if guided else 1)

    write_embeddings(tmp_path / "prompts" / "0.parquet", [0, 1, 2, NEGATIVE], list("abc-"), [*embeddings, negative])
    write_states(tmp_path / "states" / "0.parquet", states, call, dropped=0)
    write_call(tmp_path, adapter.transformer, call)
    write_splits(tmp_path, [0], [])
    samples = CalibrationSet(tmp_path)
    ids = [*samples.ids("train"), *samples.ids("validation")]
    batch = samples.batch(ids)
    result = pipeline.transformer(**batch).sample
    expected = {}
    for timestep, text, latents, output in outputs:
        for i, e in enumerate([*embeddings, negative]):
            if torch.equal(e["encoder_hidden_states"], text):
                expected.setdefault((i % 4, round(timestep, 4)), []).append((latents, output))
    for row, sample_id in enumerate(ids):
        prompt = 3 if sample_id % 2 else sample_id // (2 * KEPT)
        candidates = expected[prompt, round(batch["timestep"][row].item(), 4)]
        (output,) = [o for latents, o in candidates if torch.equal(latents, batch["hidden_states"][row])]
        torch.testing.assert_close(result[row], output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pictures_are_normalised_and_packed_as_flux_unpacks_them(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / "a.png")
    pipeline = flux_pipeline()
    adapter, config = adapter_of(pipeline.transformer), dict(pipeline.transformer.config)
    sampling = Sampling(steps=4, height=16, width=16)
    prompts, settings = EncodedPrompts([0], [embedding(0)]), StateSettings(sampling, 1, seed=5)
    states, call = noise_images(pipeline, adapter, prompts, [str(tmp_path / "a.png")], config, settings)
    assert call.each == {"guidance": 3.5} and set(call.whole) == {"img_ids", "txt_ids"}
    pixels = torch.tensor([200, 30, 90]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
    x = (pipeline.vae.encode(pixels).latent_dist.mode() - 0.1) * 1.5
    t = 1 - int(strata(5, 0, 1)[0] * 4) / 4
    assert 0 < t < 1 and states[0].timestep == pytest.approx(t)
    noise = torch.randn(states[0].latents.shape, generator=generator("noise", 5, 0, 0))
    own = (states[0].latents - t * noise) / (1 - t)
    back = pipeline._unpack_latents(own[None], 16, 16, pipeline.vae_scale_factor)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_each_family_is_encoded_by_what_its_record_says():
    """The pipeline's `encode_prompt` returns are told apart by place; the argument names are those it asks for."""

    def flux(prompt, prompt_2=None, device=None, max_sequence_length=512):
        return torch.full((len(prompt), 6, 24), 1.0), torch.full((len(prompt), 20), 2.0), torch.zeros(6, 3)

    def sd3(prompt, prompt_2, prompt_3, do_classifier_free_guidance=True, max_sequence_length=256):
        assert not do_classifier_free_guidance
        return torch.full((len(prompt), 6, 24), 1.0), None, torch.full((len(prompt), 20), 2.0), None

    for name, pipeline_class, encode_prompt in (
        ("FluxTransformer2DModel", FluxPipeline, flux),
        ("SD3Transformer2DModel", StableDiffusion3Pipeline, sd3),
    ):
        made = object.__new__(pipeline_class)
        object.__setattr__(made, "encode_prompt", encode_prompt)
        (a, b) = encode(made, adapter_of(name), ["one", "two"], Sampling())
        assert a["encoder_hidden_states"].shape == (6, 24) and (b["pooled_projections"] == 2).all() and len(a) == 2
