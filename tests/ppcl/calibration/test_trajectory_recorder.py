"""Embeddings, states and batches, held against the stock pipeline run by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl.calibration.dataset import (
    CalibrationSet,
    pack,
    unpack,
    write_call,
    write_embeddings,
    write_splits,
    write_states,
)
from ppcl.calibration.encoding import TEXT, EncodedPrompts, collate, encode
from ppcl.calibration.noised_images import noise_images, noised
from ppcl.calibration.seeding import chosen_steps, generator, strata
from ppcl.calibration.trajectory_recorder import NEGATIVE, StateSettings, record
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher

PROMPTS = ["a photo of a red circle", "a photo of two large blue squares and a small green triangle", "circle"]
SEED, KEPT = 7, 3


def sampling(**arguments):
    return Sampling(steps=5, height=32, width=32, arguments=arguments)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return Teacher(teacher_folder)


@pytest.fixture(scope="module")
def pipeline(teacher):
    return teacher.pipeline()


@pytest.fixture(scope="module")
def embeddings(teacher, pipeline):
    return encode(pipeline, teacher.adapter, PROMPTS, sampling())


def record_all(teacher, pipeline, embeddings, ids=(0, 1, 2), negative=None, how=None):
    chosen = [embeddings[i] for i in ids]
    prompts = EncodedPrompts(list(ids), chosen, negative)
    return record(pipeline, teacher.adapter, prompts, StateSettings(how or sampling(), KEPT, SEED))


def test_embeddings_are_those_of_each_prompt_alone(pipeline, embeddings):
    lengths = set()
    for text, embedding in zip(PROMPTS, embeddings, strict=True):
        alone, mask = pipeline.encode_prompt(text)
        assert mask is None
        torch.testing.assert_close(embedding[TEXT], alone[0], rtol=1e-4, atol=1e-5)
        lengths.add(len(embedding[TEXT]))
    assert len(lengths) == 3, "the prompts of this test have different lengths"


@torch.no_grad()
def trajectory_by_hand(pipeline, prompt, prompt_id, negative=None, scale=1.0):
    """(timestep, latents) of every step of one prompt alone, written anew: Euler steps of the flow, sigmas by hand."""
    embedding, _ = pipeline.encode_prompt(prompt)
    other, _ = pipeline.encode_prompt(negative) if negative is not None else (None, None)
    noise = torch.randn(1, 1, 4, 8, 8, generator=generator("trajectory", SEED, prompt_id))
    x = noise.reshape(4, 4, 2, 4, 2).permute(1, 3, 0, 2, 4).reshape(1, 16, 16)
    sigmas = [*np.linspace(1.0, 1 / 5, 5), 0.0]
    states = []
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        states.append((now, x[0]))
        given = {"hidden_states": x, "timestep": torch.tensor([now], dtype=torch.float32), "img_shapes": [[(1, 4, 4)]]}
        velocity = pipeline.transformer(**given, encoder_hidden_states=embedding).sample
        if other is not None:
            without = pipeline.transformer(**given, encoder_hidden_states=other).sample
            both = without + scale * (velocity - without)
            velocity = both * velocity.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)
        x = x + (after - now) * velocity
    return states


@pytest.mark.parametrize("guided", [False, True])
def test_states_are_those_of_the_sampling_loop_written_by_hand(teacher, pipeline, embeddings, guided):
    (negative,) = encode(pipeline, teacher.adapter, [" "], sampling()) if guided else (None,)
    how = sampling(true_cfg_scale=3.0, negative_prompt=" ") if guided else sampling()
    states, call = record_all(teacher, pipeline, embeddings, negative=negative, how=how)
    assert call.each == {"img_shapes": [(1, 4, 4)]} and call.whole == {}
    by_id = {s.sample_id: s for s in states}
    assert len(by_id) == len(states) == 3 * KEPT * (2 if guided else 1)
    for prompt_id, prompt in enumerate(PROMPTS):
        truth = trajectory_by_hand(pipeline, prompt, prompt_id, " " if guided else None, 3.0)
        for slot, step in enumerate(chosen_steps(SEED, prompt_id, KEPT, 5)):
            sides = [by_id[2 * (KEPT * prompt_id + slot) + side] for side in range(2 if guided else 1)]
            assert [s.embedding_id for s in sides] == [prompt_id, NEGATIVE][: len(sides)]
            for state in sides:
                assert state.timestep == pytest.approx(truth[step][0], abs=1e-6)
                torch.testing.assert_close(state.latents, truth[step][1], rtol=1e-3, atol=1e-4)


def test_states_do_not_depend_on_the_batch(teacher, pipeline, embeddings):
    together, _ = record_all(teacher, pipeline, embeddings)
    alone = [s for i in range(3) for s in record_all(teacher, pipeline, embeddings, ids=(i,))[0]]
    for a, b in zip(together, alone, strict=True):
        assert (a.sample_id, a.timestep) == (b.sample_id, b.timestep)
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-3, atol=1e-4)


def test_a_prompt_that_is_the_negative_prompt_has_both_sides_too(teacher, pipeline, embeddings):
    how = sampling(true_cfg_scale=3.0, negative_prompt=PROMPTS[0])
    states, _ = record_all(teacher, pipeline, embeddings, ids=(0,), negative=embeddings[0], how=how)
    assert [s.embedding_id for s in states] == [0, NEGATIVE] * KEPT


@pytest.mark.parametrize("name", ["num_images_per_prompt", "height", "guidance"])
def test_arguments_that_cannot_be_set_are_named(teacher, pipeline, embeddings, name):
    with pytest.raises(
        UserError, match=f"'{name}', which cannot be set for QwenImagePipeline; it takes .*true_cfg_scale"
    ):
        record_all(teacher, pipeline, embeddings, how=sampling(**{name: 2}))


def store_all(folder, teacher, embeddings, states, call):
    write_embeddings(folder / "prompts" / "0.parquet", range(3), PROMPTS, embeddings)
    # Rows of a file and files of a folder are in no order that matters.
    write_states(folder / "states" / "0.parquet", states[4:], call, dropped=0)
    write_states(folder / "states" / "1.parquet", states[:4], call, dropped=0)
    write_call(folder, teacher.adapter.transformer, call)
    write_splits(folder, [1], [2])
    return CalibrationSet(folder)


@torch.no_grad()
def test_a_batch_of_different_lengths_gives_the_output_of_the_stock_call(tmp_path, teacher, pipeline, embeddings):
    outputs = {}

    def look(module, args, arguments, output):
        step = pipeline.scheduler.step_index or 0
        outputs[step] = (arguments, output[0])

    hook = pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    states, call = record_all(teacher, pipeline, embeddings)
    hook.remove()
    samples = store_all(tmp_path, teacher, embeddings, states, call)
    ids = [2 * (KEPT * p + 1) for p in (2, 0, 1)]
    batch = samples.batch(ids)
    assert batch["encoder_hidden_states_mask"].sum(1).tolist() == [len(embeddings[p][TEXT]) for p in (2, 0, 1)]
    output = pipeline.transformer(**batch).sample
    for row, p in enumerate((2, 0, 1)):
        step = chosen_steps(SEED, p, KEPT, 5)[1]
        arguments, expected = outputs[step]
        assert torch.equal(batch["hidden_states"][row], arguments["hidden_states"][p])
        assert batch["timestep"][row] == arguments["timestep"][p]
        torch.testing.assert_close(output[row], expected[p], rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_length_has_no_mask_and_other_types_are_cast(tmp_path, teacher, pipeline, embeddings):
    samples = store_all(tmp_path, teacher, embeddings, *record_all(teacher, pipeline, embeddings))
    batch = samples.batch(samples.ids("validation"), dtype=torch.bfloat16)
    assert batch["encoder_hidden_states_mask"] is None
    assert batch["hidden_states"].dtype == batch["encoder_hidden_states"].dtype == torch.bfloat16
    assert batch["timestep"].dtype == torch.float32
    assert batch["img_shapes"] == [[(1, 4, 4)]] * KEPT
    with pytest.raises(KeyError, match="no sample 999"):
        samples.batch([0, 999])


def test_ids_and_prompts_are_split_by_prompt(tmp_path, teacher, pipeline, embeddings):
    samples = store_all(tmp_path, teacher, embeddings, *record_all(teacher, pipeline, embeddings))
    assert samples.ids("validation").tolist() == [2 * KEPT + 2 * slot for slot in range(KEPT)]
    assert samples.ids("train").tolist() == [2 * i for i in (0, 1, 2)]
    assert samples.ids("test").tolist() == [2 * i for i in (6, 7, 8)]
    assert samples.prompts("validation") == [(1, PROMPTS[1])]
    assert samples.prompts("train") == [(0, PROMPTS[0])]
    assert samples.prompts("test") == [(2, PROMPTS[2])]
    assert samples.seen_prompts() == {PROMPTS[0], PROMPTS[1]}


def test_memory_of_random_access_is_bounded(tmp_path, monkeypatch, teacher, pipeline, embeddings):
    from ppcl.calibration import dataset as store

    monkeypatch.setattr(store, "_ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(store, "_CACHE_BYTES", 3000)
    states, call = record_all(teacher, pipeline, embeddings)
    samples = store_all(tmp_path, teacher, embeddings, states, call)
    for state in states * 2:
        assert torch.equal(samples.batch([state.sample_id])["hidden_states"][0], state.latents)
        assert samples._states.cached <= 3000
        assert samples._states.cached == sum(t.nbytes for t in samples._states.cache.values())


def test_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no complete calibration set"):
        CalibrationSet(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_survive_the_store_bitwise(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    assert torch.equal(unpack(pack(tensor)), tensor)


def test_noised_pictures_are_those_computed_by_hand(tmp_path, teacher, pipeline, embeddings):
    images = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        images.append(str(tmp_path / f"{i}.png"))
    reduced = teacher.pipeline_without_transformer()
    states, call = noise_images(
        reduced,
        teacher.adapter,
        EncodedPrompts([0, 1, 2], embeddings),
        images,
        teacher.config(),
        StateSettings(sampling(true_cfg_scale=3.0), KEPT, SEED),
    )
    assert call.each == {"img_shapes": [(1, 4, 4)]}
    assert len(states) == 3 * KEPT
    for state in states:
        prompt, slot = divmod(state.sample_id // 2, KEPT)
        pixels = torch.tensor(np.array(Image.open(images[prompt]))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        with torch.no_grad():
            z = reduced.vae.encode(pixels).latent_dist.mode()[0, :, 0]  # (4, 8, 8), mean 0 and deviation 1 in this VAE
        x = torch.zeros(16, 16)
        for row in range(8):
            for column in range(8):
                for channel in range(4):
                    x[row // 2 * 4 + column // 2, channel * 4 + row % 2 * 2 + column % 2] = z[channel, row, column]
        # Unshifted, with five steps: 1, 0.8, … 0.2.
        t = 1 - int(strata(SEED, prompt, KEPT)[slot] * 5) / 5
        noise = torch.randn(16, 16, generator=generator("noise", SEED, prompt, slot))
        assert state.timestep == pytest.approx(t, abs=1e-6)
        torch.testing.assert_close(state.latents, (1 - t) * x + t * noise, rtol=1e-4, atol=1e-4)


def test_noise_runs_from_the_picture_to_noise():
    x, e = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    out = noised(x, e, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], e[1])
    torch.testing.assert_close(out[2], 0.75 * x[2] + 0.25 * e[2])


def test_a_picture_that_cannot_be_read_is_named(tmp_path, teacher, pipeline, embeddings):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    prompts, settings = EncodedPrompts([0], embeddings[:1]), StateSettings(sampling(), KEPT, SEED)
    with pytest.raises(UserError, match="broken.png cannot be read"):
        noise_images(pipeline, teacher.adapter, prompts, [str(path)], teacher.config(), settings)


def test_texts_of_one_length_are_not_masked(teacher, embeddings):
    assert collate([embeddings[0]] * 2, teacher.adapter)["encoder_hidden_states_mask"] is None
