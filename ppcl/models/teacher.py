"""The teacher: a diffusers pipeline in a folder or a bucket, loaded safely, whole or only some blocks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.models import IdentityBlock, ModelAdapter, adapter_of, swap
from ppcl.models.remote_safetensors import RemoteWeights
from ppcl.storage.node_cache import file_sha256, parallel_map
from ppcl.storage.object_store import Store

if TYPE_CHECKING:
    from diffusers import ModelMixin

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = ".safetensors"
# Prefixes of the names of those components, beside the transformer, that are models.
_PARTS_WITH_WEIGHTS = ("text_encoder", "vae")
_LFS_POINTER = b"version https://git-lfs"
_TRUSTED_LIBRARIES = ("diffusers", "transformers")
# The name of the module that an export brings for blocks that are not stock: `ppcl.models.pruned_transformer`.
EXPORTED_MODULE = "ppcl_transformer"


def vae_shrinks_by(config: Mapping[str, Any]) -> int:
    """The side of a latent in an image, pixels, by the VAE's `config.json`."""
    # Of the two kinds of VAEs that the pipelines have.
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config["block_out_channels"]) - 1)


class Teacher:
    """A diffusers pipeline: its files, classes and adapter are checked, no weights are loaded yet.

    `place`: the text of its location, a folder or an `s3://` URL. `folder`: its files on this node; of a bucket the
    small ones, as they were when the bucket was listed. `hashes`: of weights in a bucket the sha256 by URL and tag, as
    far as they are known. Raises `UserError` where the location holds no diffusers pipeline, its transformer is not
    supported, it needs code of its own, or its weights are pickles.
    """

    def __init__(self, location: LocationLike, hashes: Mapping[str, str] | None = None):
        """`hashes`: those of an earlier `Teacher`, which are not asked for and computed again."""
        location = Location.of(location)
        self.hashes = dict(hashes or {})
        self.store = Store(location.url) if location.is_url else None
        if self.store:
            self._listed = self.store.objects()
            self.folder = self.store.snapshot(
                [name for name in self._listed if not name.endswith(_WEIGHTS)], self._listed
            )
        else:
            self.folder = location.path.absolute()
        self.place = str(location.absolute())
        index = self._json("model_index.json")
        entry = index.get("transformer")
        if not entry:
            raise UserError(
                f"{self.place} is a {index.get('_class_name')}, which has no transformer; point to an MMDiT pipeline"
            )
        if entry[0] == EXPORTED_MODULE:
            raise UserError(
                f"{self.place} is an export whose blocks are not all stock blocks, which cannot be compressed again; "
                "export a plan of stock blocks, or give the teacher that it was made from"
            )
        self.adapter: ModelAdapter = adapter_of(entry[1])
        self.pipeline_class: str = index["_class_name"]
        for name, value in index.items():
            if isinstance(value, list) and value[0] is not None and value[0] not in _TRUSTED_LIBRARIES:
                raise UserError(
                    f"{self.place}/model_index.json takes {name} from {value[0]!r}: code from a model folder is never "
                    f"run; only classes of {' and '.join(_TRUSTED_LIBRARIES)} are loaded"
                )
        if self.pipeline_class not in self.adapter.pipelines:
            raise UserError(
                f"{self.place} is a {self.pipeline_class}; supported for {self.adapter.transformer}: "
                f"{', '.join(self.adapter.pipelines)}"
            )
        for name in self._names():
            if PurePosixPath(name).suffix in _PICKLES:
                raise UserError(
                    f"{self.place}/{name} is a pickle, which can run code when it is loaded; convert the weights to "
                    "safetensors (save_pretrained with safe_serialization) and remove the file"
                )
        self._check_weights(index)
        self.transformer_files = self._transformer_files()

    def _check_weights(self, index: dict[str, Any]) -> None:
        """Refuse weights that are not there, from names and first bytes alone. Raises `UserError`."""
        names = self._names()
        for name in names:
            if not self.store and name.endswith(_WEIGHTS) and _is_lfs_pointer(self.folder / name):
                raise UserError(
                    f"{self.place}/{name} is a Git LFS pointer in place of the weights; run git lfs pull in the folder"
                )
            if name.endswith(f"{_WEIGHTS}.index.json"):
                self._check_shards(name, names)
        for part, value in index.items():
            if not isinstance(value, list) or value[0] is None or not part.startswith(_PARTS_WITH_WEIGHTS):
                continue
            if not any(name.startswith(f"{part}/") and name.endswith(_WEIGHTS) for name in names):
                raise UserError(
                    f"{self.place}/{part} holds no {_WEIGHTS} file; get a complete copy, or save it as safetensors"
                )

    def _check_shards(self, index_name: str, names: Collection[str]) -> None:
        folder = PurePosixPath(index_name).parent
        for shard in sorted(set(self._json(index_name).get("weight_map", {}).values())):
            if str(folder / shard) not in names:
                raise UserError(
                    f"{self.place}/{folder / shard} is missing, which {index_name} names; get a complete copy of it"
                )

    def _names(self) -> list[str]:
        """The paths of all files under the pipeline's folder."""
        if self.store:
            return sorted(self._listed)
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            raise UserError(
                f"{self.place} is not a diffusers pipeline folder: {path.name} is missing; point to a folder written "
                "by save_pretrained"
            )
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.place}/{name} is not valid JSON ({error}); get an intact copy of it") from None

    def _transformer_files(self) -> dict[str, str]:
        """The safetensors file of each tensor of the transformer, by name, relative to the pipeline's folder."""
        sharded = "transformer/diffusion_pytorch_model.safetensors.index.json"
        if (self.folder / sharded).exists():
            return {name: f"transformer/{file}" for name, file in self._json(sharded)["weight_map"].items()}
        single = "transformer/diffusion_pytorch_model.safetensors"
        if single not in self._names():
            raise UserError(
                f"{self.place}/transformer holds no diffusion_pytorch_model.safetensors; save the transformer as "
                "safetensors"
            )
        if self.store:
            return dict.fromkeys(self._remote_weights(single).names, single)
        with _open(self.folder / single) as file:
            return dict.fromkeys(file.keys(), single)

    def _sha256(self, name: str) -> str:
        """The sha256 of a file's content, the same wherever the file lies.

        Weights in a bucket are read for it only where their writer left none, in constant memory.
        """
        if self.store is None or not name.endswith(_WEIGHTS):
            return file_sha256(self.folder / name)
        if (key := self._hash_key(name)) not in self.hashes:
            self.hashes[key] = self.store.sha256(name) or self._sha256_of_content(name)
        return self.hashes[key]

    def _hash_key(self, name: str) -> str:
        """Another content under the same URL has another tag."""
        return f"{self.place}/{name} {self._listed[name].tag}"

    def _sha256_of_content(self, name: str) -> str:
        assert self.store is not None
        size, tag = self._listed[name]
        try:
            return self.store.sha256_of_content(name, size, tag)
        except FileExistsError:
            raise UserError(
                f"{self.place}/{name} was replaced while it was read; leave the teacher as it is until the job has "
                "ended, and run the same command again"
            ) from None

    def bytes_without_sha256(self) -> int:
        """The size of the weights in a bucket that have to be read for their sha256: their writer left none."""
        if self.store is None:
            return 0
        names = [name for name in self._listed if name.endswith(_WEIGHTS) and self._hash_key(name) not in self.hashes]
        left = dict(zip(names, parallel_map(self.store.sha256, names), strict=True))
        self.hashes |= {self._hash_key(name): sha256 for name, sha256 in left.items() if sha256}
        return sum(self._listed[name].size for name, sha256 in left.items() if not sha256)

    def sha256(self) -> str:
        """One hash over the transformer's configuration and weights, by which a result identifies its teacher."""
        digest = hashlib.sha256((self.folder / "transformer" / "config.json").read_bytes())
        for sha256 in parallel_map(self._sha256, sorted(set(self.transformer_files.values()))):
            digest.update(sha256.encode())
        return digest.hexdigest()

    def part_hashes(self) -> dict[str, str]:
        """The sha256 of all files of the pipeline's other parts (text encoders, tokenizer, VAE, scheduler), by path."""
        names = self.part_files()
        return dict(zip(names, parallel_map(self._sha256, names), strict=True))

    def part_files(self) -> list[str]:
        """The paths of all files of the pipeline's parts beside the transformer."""
        index = self._json("model_index.json")
        parts = {name for name, value in index.items() if isinstance(value, list) and name != "transformer"}
        return [name for name in self._names() if name.split("/")[0] in parts]

    def pixels_a_token(self) -> int:
        """The side of a token in an image, pixels: what the VAE shrinks by, times the patches of 2."""
        return 2 * vae_shrinks_by(self.vae_config())

    def vae_config(self) -> dict[str, Any]:
        return self._json("vae/config.json")

    def component_parameters(self) -> dict[str, int]:
        """The parameters of the pipeline's other parts, by name, from the headers of their files alone."""
        counts: dict[str, int] = {}
        for name in self._names():
            part = name.split("/")[0]
            if name.endswith(_WEIGHTS) and part != "transformer" and "/" in name:
                counts[part] = counts.get(part, 0) + sum(math.prod(shape) for shape in self._shapes(name))
        return counts

    def _shapes(self, name: str) -> Iterator[Sequence[int]]:
        """The shapes of a file's tensors."""
        if self.store:
            yield from (entry["shape"] for entry in self._remote_weights(name).header.values())
            return
        with _open(self.folder / name) as file:
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                yield file.get_slice(tensor).get_shape()

    def versions(self) -> dict[str, str]:
        """By file, what changes with its content and is had without reading it: size and times, or an object's tag.

        Of a bucket as it is now, which may be another than was listed when the teacher was opened.
        """
        if self.store:
            return {name: object.tag for name, object in self.store.objects().items()}
        versions = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                status = path.stat()
                # The time of the last change of any kind, since a copy may keep that of the content.
                versions[str(path.relative_to(self.folder))] = (
                    f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                )
        return versions

    def with_weights(self, transformer: bool = True, others: bool = True) -> Path:
        """The folder on this node with weights, of the transformer and of the other parts; downloads missing ones."""
        if self.store:

            def wanted(name: str) -> bool:
                return transformer if name.startswith("transformer/") else others

            names = [name for name in self._listed if not name.endswith(_WEIGHTS) or wanted(name)]
            return self.store.snapshot(names, self._listed)
        return self.folder

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32, transformer_only: bool = False) -> Any:
        """The stock diffusers pipeline. The transformer's parameters do not require gradients.

        `transformer_only`: without the text encoders and the VAE, which only drawing images needs.
        """
        import diffusers

        index = self._json("model_index.json") if transformer_only else {}
        left_out = {part: None for part in index if part.startswith(_PARTS_WITH_WEIGHTS)}
        pipeline_class = getattr(diffusers, self.pipeline_class)
        pipeline = pipeline_class.from_pretrained(
            self.with_weights(others=not transformer_only),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **left_out,
        )
        pipeline.set_progress_bar_config(disable=True)
        # Modules with gradients count as being trained, and their products are not cached.
        pipeline.transformer.requires_grad_(False)
        return pipeline.to(device)

    def pipeline_without_transformer(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The stock pipeline with `transformer=None`: enough to encode prompts and images."""
        import diffusers

        pipeline_class = getattr(diffusers, self.pipeline_class)
        pipeline = pipeline_class.from_pretrained(
            self.with_weights(transformer=False),
            transformer=None,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def config(self) -> dict[str, Any]:
        return self._json("transformer/config.json")

    def empty_transformer(self) -> ModelMixin:
        """The transformer with all its parameters on the meta device: structure without memory."""
        import diffusers

        with init_empty_weights():
            return getattr(diffusers, self.adapter.transformer).from_config(self.config()).eval()

    def transformer(
        self,
        keep: Collection[int] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[nn.Module], None] | None = None,
        blocks_only: bool = False,
    ) -> ModelMixin:
        """The transformer with embedders, head and the blocks `keep` (all by default).

        `blocks_only`: without embedders and head, which stay on the meta device.

        Only their tensors are read from the safetensors files; identity blocks take the places of the others, so a rank
        holds its own blocks alone. Parameters do not require gradients. `prepare(block)` is called for every block as
        soon as its weights are there, so that a block can be cut up before the next one is read. Raises `UserError` for
        NaN or infinite weights.
        """
        model = self.empty_transformer()
        count = len(self.adapter.blocks(model))
        keep = set(range(count)) if keep is None else set(keep)
        dropped = [self._prefix(model, block) for block in range(count) if block not in keep]
        through = IdentityBlock(self.adapter)
        swap(model, {block: through for block in range(count) if block not in keep})
        waiting = _BlocksToPrepare(
            {self._prefix(model, number): block for number, block in enumerate(self.adapter.blocks(model))}
            if prepare
            else {}
        )
        kept = tuple(self._prefix(model, block) for block in keep)

        def wanted(name: str) -> bool:
            return name.startswith(kept) if blocks_only else not name.startswith(tuple(dropped))

        for name, tensor in self._tensors(wanted):
            if not tensor.isfinite().all():
                raise UserError(
                    f"the weight {name} in {self.place}/{self.transformer_files[name]} has NaN or infinite values; get "
                    "an intact copy of it"
                )
            # Without `dtype`, accelerate would convert it to the type of the empty structure.
            set_module_tensor_to_device(
                model, name, device, tensor, dtype=dtype if tensor.is_floating_point() else None
            )
            if prepare and (block := waiting.complete(name)):
                prepare(block.requires_grad_(False))
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta and wanted(name)]
        if missing:
            raise UserError(f"{self.place}/transformer lacks {len(missing)} weights, the first being {missing[0]}")
        return model.requires_grad_(False)

    def _prefix(self, model: nn.Module, block: int) -> str:
        """A block's prefix in the names of its tensors, such as `transformer_blocks.3.`."""
        for name, span in zip(self.adapter.block_lists, self.adapter.block_ranges(model), strict=True):
            if block in span:
                return f"{name}.{block - span.start}."
        raise UserError(f"block {block} does not exist in {self.place}")

    def _remote_weights(self, name: str) -> RemoteWeights:
        assert self.store is not None
        return RemoteWeights(self.store, name, self._listed[name].tag)

    def _tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        by_file: dict[str, list[str]] = {}
        for name, file in self.transformer_files.items():
            if wanted(name):
                by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            if self.store:
                yield from self._remote_weights(file).tensors(names)
                continue
            with _open(self.folder / file) as opened:
                for name in names:
                    yield name, opened.get_tensor(name)


def _is_lfs_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); get an intact copy of it") from None


class _BlocksToPrepare:
    """Tells when the last weight of a block has been read. `blocks`: by the prefix of their tensors' names."""

    def __init__(self, blocks: dict[str, nn.Module]):
        self.blocks = blocks

    def complete(self, name: str) -> nn.Module | None:
        """The block that a tensor has made complete; None where others are missing, or where it is in no block."""
        prefix = next((prefix for prefix in self.blocks if name.startswith(prefix)), None)
        if prefix is None or any(parameter.is_meta for parameter in self.blocks[prefix].parameters()):
            return None
        return self.blocks.pop(prefix)
