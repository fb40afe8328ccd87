"""The files of a diffusers pipeline, in a folder or a bucket: which it loads, and the headers of its weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ppcl.config.location import Location
from ppcl.errors import UserError
from ppcl.models.remote_safetensors import RemoteWeights
from ppcl.models.safetensors_header import Header, read_header
from ppcl.storage.object_store import Object, Store

INDEX = "model_index.json"
WEIGHTS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Of other libraries, beside those that are loaded.
_OTHER_WEIGHTS = (".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")
# Prefixes of the names of those components that are models.
_MODELS = ("text_encoder", "vae", "transformer", "image_encoder")
# By the library of a component's class, how `save_pretrained` names its weights.
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_LFS_POINTER = b"version https://git-lfs"
# A pointer has three short lines.
_LONGEST_POINTER = 1024


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor: `dtype`, such as `BF16`, and where in the file its numbers begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ModelWeights:
    """The safetensors files of one component, by paths relative to the pipeline's folder.

    `files`: those that are loaded, by the names that they have without a variant. `index`: of shards, None of a single
    file. `variant`: such as `fp16`, None of plain names.
    """

    index: str | None
    files: Mapping[str, str]
    variant: str | None


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a pipeline; `place` is the text of its location.

    `folder`: its files on this node; of a bucket the small ones, as they were when the bucket was listed. Only the
    folders that `model_index.json` names count, not what else lies beside them. Folders and files may be links.
    """

    place: str
    store: Store | None
    folder: Path
    listed: Mapping[str, Object] = field(default_factory=dict)

    @classmethod
    def of(cls, location: Location) -> PipelineFiles:
        """Raises `UserError` where there is no pipeline."""
        place = str(location.absolute())
        if not location.is_url:
            folder = location.path.absolute()
            _require_folder(folder)
            return cls(place, None, folder)
        store = Store(location.url)
        listed = store.objects()
        if INDEX not in listed:
            raise UserError(_no_pipeline(place, INDEX))
        parts = _parsed(store.read(INDEX), f"{place}/{INDEX}")
        return cls(place, store, store.snapshot(_small_names(listed, parts), listed), listed)

    @cached_property
    def pipeline_index(self) -> dict[str, Any]:
        return self.json(INDEX)

    @cached_property
    def components(self) -> dict[str, tuple[str, str]]:
        """The library and the class of each component that is there, by name."""
        entries = {n: value for n, value in self.pipeline_index.items() if isinstance(value, list) and len(value) == 2}
        return {name: (value[0], value[1]) for name, value in entries.items() if value[0] is not None}

    @property
    def models(self) -> list[str]:
        """The names of the components that have weights."""
        return [name for name in self.components if name.startswith(_MODELS)]

    def names(self) -> list[str]:
        """The paths of the files of all components, sorted, those that are not loaded among them."""
        if self.store:
            return sorted(name for name in self.listed if "/" in name and name.split("/")[0] in self.components)
        return sorted(name for part in self.components for name in _files_below(self.folder, part))

    def small_names(self) -> list[str]:
        """Of a bucket, the files without weights."""
        return _small_names(self.listed, self.pipeline_index)

    def json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            raise UserError(_no_pipeline(self.place, name))
        return _parsed(path.read_bytes(), f"{self.place}/{name}")

    @cached_property
    def weights(self) -> dict[str, ModelWeights]:
        """The weights of each model. Raises `UserError` for missing ones.

        Plain names come before those with a variant. As in the stock pipeline, which takes one variant, a model without
        that variant has its plain names.
        """
        names = self.names()
        found = {part: _choices(part, _STEMS[self.components[part][0]], names) for part in self.models}
        for part, choices in found.items():
            if not choices:
                raise UserError(self._no_weights(part, names))
        lacking = [set(choices) for choices in found.values() if None not in choices]
        variant = None
        if lacking:
            common = set.intersection(*lacking)
            if not common:
                seen = ", ".join(f"{part}: {' '.join(map(str, c))}" for part, c in found.items() if None not in c)
                raise UserError(
                    f"{self.place} has weights of different variants ({seen}), and a pipeline takes one; save it in one"
                )
            variant = sorted(name for name in common if name)[0]
        chosen = {part: choices[variant if variant in choices else None] for part, choices in found.items()}
        return {part: self._shards(part, weights, names) for part, weights in chosen.items()}

    def variant_of(self, parts: Iterable[str]) -> str | None:
        """The variant that the stock pipeline is asked for where it loads these models."""
        return next((variant for part in parts if (variant := self.weights[part].variant)), None)

    def _no_weights(self, part: str, names: Collection[str]) -> str:
        place, stem = f"{self.place}/{part}", _STEMS[self.components[part][0]]
        for name in names:
            if name.startswith(f"{part}/") and name.endswith(".gguf"):
                return f"{self.place}/{name} is quantised (GGUF); get the weights in bfloat16, as safetensors"
        return f"{place} holds no {stem}{WEIGHTS}; get a complete copy, or save it as safetensors"

    def _shards(self, part: str, weights: ModelWeights, names: Collection[str]) -> ModelWeights:
        """With the shards that the index names, which must be there."""
        if weights.index is None:
            return weights
        shards = sorted(set(self._weight_map(weights.index).values()))
        for shard in shards:
            if f"{part}/{shard}" not in names:
                raise UserError(
                    f"{self.place}/{part}/{shard} is missing, which {weights.index} names; get a complete copy of it"
                )
        plain = f"{part}/{_STEMS[self.components[part][0]]}{WEIGHTS}.index.json"
        files = {plain: weights.index, **{f"{part}/{shard}": f"{part}/{shard}" for shard in shards}}
        return ModelWeights(weights.index, files, weights.variant)

    def _weight_map(self, index: str) -> dict[str, str]:
        weight_map = self.json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.place}/{index} names no weights (weight_map); get an intact copy of it")
        return weight_map

    def tensor_files(self, part: str) -> dict[str, str]:
        """The file of each tensor of a model, by name, relative to the pipeline's folder."""
        weights = self.weights[part]
        if weights.index is not None:
            return {name: f"{part}/{file}" for name, file in self._weight_map(weights.index).items()}
        (file,) = weights.files.values()
        return dict.fromkeys(self.header(file), file)

    def part_files(self) -> dict[str, str]:
        """The files of the components beside the transformer that are loaded, by the names without a variant."""
        weights = {name for part in self.models for name in self.weights[part].files.values()}
        canonical = {real: name for part in self.models for name, real in self.weights[part].files.items()}
        loaded = {}
        for name in self.names():
            is_index = PurePosixPath(name).match(f"*{WEIGHTS}.index*.json")
            skipped = name.endswith((WEIGHTS, *_OTHER_WEIGHTS)) or is_index
            if name.split("/")[0] != "transformer" and (name in weights or not skipped):
                loaded[canonical.get(name, name)] = name
        return loaded

    def header(self, name: str) -> dict[str, TensorHeader]:
        """The tensors of a file, from its header alone."""
        if self.store:
            weights = self.remote_weights(name)
            header, start = weights.header, weights.start
        else:
            header, start = _local_header(self.folder / name)
        return {
            tensor: TensorHeader(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for tensor, entry in header.items()
        }

    def remote_weights(self, name: str) -> RemoteWeights:
        assert self.store is not None
        return RemoteWeights(self.store, name, self.listed[name].tag, self.listed[name].size)

    def versions(self) -> dict[str, str]:
        """By file, what changes with its content and is had without reading it: size and times, or an object's tag.

        Of a bucket as it is now, which may be another than was listed.
        """
        if self.store:
            now = self.store.objects()
            return {name: o.tag for name, o in now.items() if name == INDEX or name.split("/")[0] in self.components}
        versions = {}
        for name in [INDEX, *self.names()]:
            status = (self.folder / name).stat()
            # The time of the last change of any kind, since a copy may keep that of the content. A link has the inode
            # of what it leads to.
            versions[name] = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        return versions

    def check(self) -> None:
        """Refuse pickles, and files that are not the files. Raises `UserError`, by names and first bytes alone."""
        names = self.names()
        for name in names:
            if PurePosixPath(name).suffix in _PICKLES:
                raise UserError(
                    f"{self.place}/{name} is a pickle, which can run code when it is loaded; convert the weights to "
                    "safetensors (save_pretrained with safe_serialization) and remove the file"
                )
        for part in self.components:
            if not any(name.startswith(f"{part}/") for name in names):
                raise UserError(f"{self.place}/{part} is missing, which {INDEX} names; get a complete copy")
        if variant := self.variant_of(self.models):
            for part, entry in sorted({(name.split("/")[0], name.split("/")[1]) for name in names}):
                if "." not in entry:
                    raise UserError(
                        f"{self.place}/{part}/{entry} has no ending, at which diffusers fails where weights are of a "
                        f"variant ({variant}); move it out of the folder"
                    )
        weights = [file for part in self.models for file in self.weights[part].files.values()]
        for name in sorted({*weights, *self.part_files().values()}):
            if self._is_pointer(name):
                what = "weights" if name.endswith(WEIGHTS) else "file"
                raise UserError(
                    f"{self.place}/{name} is a Git LFS pointer in place of the {what}; run git lfs pull in the folder"
                    + (" and upload it again" if self.store else "")
                )

    def _is_pointer(self, name: str) -> bool:
        if self.store and self.listed[name].size > _LONGEST_POINTER:
            return False
        if self.store and name.endswith(WEIGHTS):
            content = self.store.read(name) if self.listed[name].size else b""
            return content.startswith(_LFS_POINTER)
        with open(self.folder / name, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def open_weights(path: Path) -> Any:
    """Open a safetensors file of this machine. Raises `UserError` where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _unreadable(path, error) from None


def _local_header(path: Path) -> tuple[Header, int]:
    """Without a mapping of the file, which may be larger than what the machine can map."""

    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    try:
        with open(path, "rb") as file:
            return read_header(read, path.stat().st_size)
    except (ValueError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as safetensors ({error}); get an intact copy of it")


def _require_folder(folder: Path) -> None:
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; point to the folder of a diffusers pipeline, with {INDEX}, as save_pretrained writes "
            "it"
        )
    if not (folder / INDEX).is_file() and (snapshots := sorted(folder.glob(f"snapshots/*/{INDEX}"))):
        raise UserError(f"{folder} is a folder of the hub's cache; point to {snapshots[-1].parent}")


def _no_pipeline(place: str, name: str) -> str:
    return (
        f"{place} is not a diffusers pipeline folder: {name} is missing; point to a folder written by save_pretrained"
    )


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.startswith(_LFS_POINTER):
            raise UserError(f"{name} is a Git LFS pointer in place of the file; run git lfs pull") from None
        raise UserError(f"{name} is not valid JSON ({error}); get an intact copy of it") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} is no JSON object; get an intact copy of it")
    return value


def _small_names(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """The files without weights, of those at the root and in the folders that the pipeline's index names."""
    small = [name for name in names if not name.endswith((WEIGHTS, *_PICKLES, *_OTHER_WEIGHTS))]
    return [name for name in small if "/" not in name or name.split("/")[0] in index]


def _files_below(folder: Path, part: str) -> Iterable[str]:
    """The files of a component's folder. Links are followed, each folder once."""
    seen = {os.path.realpath(folder / part)}
    for root, folders, files in os.walk(folder / part, followlinks=True):
        real = {name: os.path.realpath(Path(root, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen.update(real.values())
        for name in files:
            path = Path(root, name)
            if not path.exists():
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, which does not exist; get a complete copy of it"
                )
            yield str(path.relative_to(folder))


def _choices(part: str, stem: str, names: Iterable[str]) -> dict[str | None, ModelWeights]:
    """The weights of a model by variant, None for plain names."""
    single = re.compile(rf"{part}/{stem}(?:\.(?P<variant>[^./]+))?{re.escape(WEIGHTS)}")
    index = re.compile(rf"{part}/{stem}{re.escape(WEIGHTS)}\.index(?:\.(?P<variant>[^./]+))?\.json")
    found: dict[str | None, ModelWeights] = {}
    # The stock loaders differ in which they take where both are there.
    patterns = (index, single) if stem == _STEMS["transformers"] else (single, index)
    for pattern in patterns:
        for name in names:
            match = pattern.fullmatch(name)
            if match and not re.search(r"-\d{5}-of-\d{5}$", match["variant"] or ""):
                files = {} if pattern is index else {f"{part}/{stem}{WEIGHTS}": name}
                found[match["variant"]] = ModelWeights(name if pattern is index else None, files, match["variant"])
    return found
