"""A teacher in a bucket: its weights are read by range."""

import pytest
import torch

from ppcl.errors import UserError
from ppcl.models.remote_safetensors import RemoteWeights
from ppcl.models.teacher import Teacher
from tests.teacher_folders import upload_all


def test_a_rank_reads_the_ranges_of_its_own_blocks_and_no_weight_else(store, s3, teacher_folder):
    upload_all(teacher_folder, store)
    whole, local = Teacher(store.url), Teacher(teacher_folder)
    assert whole.sha256() == local.sha256() and whole.part_hashes() == local.part_hashes()
    s3.requests.clear()
    mine, theirs = whole.transformer(keep=[1, 2]), local.transformer(keep=[1, 2])
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    read = [r for r in s3.requests if r.path.endswith("safetensors") and r.method == "GET"]
    assert read and all(r.range for r in read)
    kept = sum(p.nbytes for p in mine.parameters())
    header = 100_000
    assert (
        kept
        <= sum(r.sent for r in read)
        < kept + header
        < (teacher_folder / whole.transformer_files["proj_out.weight"]).stat().st_size
    )
    assert not list(whole.folder.rglob("*.safetensors"))


def test_weights_that_are_replaced_while_they_are_read_are_refused(store, teacher_folder):
    """Half of one model and half of another would be read without a word."""
    upload_all(teacher_folder, store)
    name = "transformer/diffusion_pytorch_model.safetensors"
    weights = RemoteWeights(store, name, store.objects()[name].tag)
    assert len(dict(weights.tensors(["proj_out.weight"]))) == 1
    store.write(name, store.read(name) + b"\0")
    with pytest.raises(UserError, match=f"{name} was replaced while it was read"):
        list(weights.tensors(["proj_out.weight"]))


def test_weights_that_are_replaced_after_the_teacher_was_opened_are_refused(store, teacher_folder):
    upload_all(teacher_folder, store)
    teacher, name = Teacher(store.url), "transformer/diffusion_pytorch_model.safetensors"
    store.write(name, store.read(name) + b"\0")
    with pytest.raises(UserError, match=f"{name} was replaced while it was read"):
        teacher.transformer()


def test_a_pipeline_in_a_bucket_is_the_one_in_the_folder_and_another_version_is_another_snapshot(store, teacher_folder):
    upload_all(teacher_folder, store)
    teacher = Teacher(store.url)
    parts = teacher.pipeline_without_transformer()
    assert parts.transformer is None and parts.text_encoder is not None
    whole = teacher.pipeline()
    stock = Teacher(teacher_folder).pipeline()
    for (name, a), (_, b) in zip(whole.vae.named_parameters(), stock.vae.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    before = teacher.folder
    store.write("scheduler/scheduler_config.json", store.read("scheduler/scheduler_config.json") + b"\n")
    assert Teacher(store.url).folder != before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model_index.json", None, "is not a diffusers pipeline folder"),
        ("transformer/x.bin", b"", "x.bin is a pickle"),
        ("transformer/diffusion_pytorch_model.safetensors", b"\xff" * 64, "cannot be read as safetensors"),
        ("transformer/diffusion_pytorch_model.safetensors", None, "holds no diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_model_in_a_bucket_that_cannot_be_used_is_told(store, teacher_folder, name, content, sentence):
    upload_all(teacher_folder, store)
    store.remove(name) if content is None else store.write(name, content)
    with pytest.raises(UserError, match=sentence) as told:
        Teacher(store.url)
    assert store.url in str(told.value)


def put_without_sha256(folder, store):
    """As other tools than ours upload a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            store._call("put_object", Key=store._key(name), Body=path.read_bytes())


def test_weights_without_a_sha256_in_the_bucket_are_those_of_the_folder_and_are_read_for_it_once(
    store, s3, teacher_folder, monkeypatch
):
    monkeypatch.setattr("ppcl.storage.object_store._PART_BYTES", 10_000)
    put_without_sha256(teacher_folder, store)
    local, remote = Teacher(teacher_folder), Teacher(store.url)
    size = sum(path.stat().st_size for path in teacher_folder.rglob("*.safetensors"))
    assert remote.bytes_without_sha256() == size and local.bytes_without_sha256() == 0
    assert remote.sha256() == local.sha256() and remote.part_hashes() == local.part_hashes()
    s3.requests.clear()
    again = Teacher(store.url, remote.hashes)
    assert again.bytes_without_sha256() == 0
    assert again.sha256() == local.sha256() and again.part_hashes() == local.part_hashes()
    header = 100_000
    assert sum(r.sent for r in s3.requests if r.method == "GET" and r.path.endswith("safetensors")) < header


def test_other_weights_under_the_same_url_are_another_teacher_whatever_was_known(store, teacher_folder):
    put_without_sha256(teacher_folder, store)
    before = Teacher(store.url)
    sha256, name = before.sha256(), "transformer/diffusion_pytorch_model.safetensors"
    content = store.read(name)
    store._call("put_object", Key=store._key(name), Body=content[:-4] + bytes(4))
    assert Teacher(store.url, before.hashes).sha256() != sha256
    with pytest.raises(UserError, match=f"{name} was replaced while it was read"):
        before._sha256_of_content(name)
