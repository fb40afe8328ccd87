"""The weights of scorers are local: a folder, a file, or an object in a bucket, given by path."""

from __future__ import annotations

from pathlib import Path

from ppcl.config.location import Location
from ppcl.errors import UserError
from ppcl.storage.mirror import download, local_file
from ppcl.storage.node_cache import mirror
from ppcl.storage.object_store import Store


def model_folder(place: str) -> Path:
    """The folder of a model on this node, downloaded where it is in a bucket. Raises `UserError`."""
    location = Location.of(place)
    if not location.is_url:
        if not location.path.is_dir():
            raise UserError(f"the model folder {place} does not exist; give a folder on every node, or s3://bucket/key")
        return location.path
    folder = mirror(Store(location.url).url)
    download(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"the model folder {place} does not exist; upload it or correct the URL")
    return folder


def weights_file(place: str) -> Path:
    """A `.safetensors` file on this node. Raises `UserError` for another kind: pickled weights can run code."""
    path = local_file(place)
    if not path.is_file():
        raise UserError(f"the weights {place} do not exist; give the path of a .safetensors file")
    if path.suffix != ".safetensors":
        raise UserError(f"the weights {place} are no .safetensors file; convert them")
    return path
