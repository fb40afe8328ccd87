"""The teacher: a diffusers pipeline in a folder or a bucket, loaded safely, whole or only some blocks."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.models import IdentityBlock, ModelAdapter, adapter_of, check_record, swap
from ppcl.models.pipeline_files import INDEX, WEIGHTS, PipelineFiles, open_weights
from ppcl.models.schedulers import check_scheduler, few_step_note
from ppcl.models.weight_checks import TRANSFORMER, check_names, check_unquantised, not_finite
from ppcl.storage.node_cache import file_sha256, parallel_map

if TYPE_CHECKING:
    from diffusers import ModelMixin

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
        self.files = files = PipelineFiles.of(Location.of(location))
        self.hashes = dict(hashes or {})
        self.place, self.folder, self.store = files.place, files.folder, files.store
        entry = files.components.get(TRANSFORMER)
        if not entry:
            raise UserError(
                f"{self.place} is a {files.pipeline_index.get('_class_name')}, which has no transformer; point to an "
                "MMDiT pipeline"
            )
        if entry[0] == EXPORTED_MODULE:
            raise UserError(
                f"{self.place} is an export whose blocks are not all stock blocks, which cannot be compressed again; "
                "export a plan of stock blocks, or give the teacher that it was made from"
            )
        self.adapter: ModelAdapter = adapter_of(entry[1])
        self.pipeline_class = str(files.pipeline_index.get("_class_name"))
        for name, (library, _) in files.components.items():
            if library not in _TRUSTED_LIBRARIES:
                raise UserError(
                    f"{self.place}/{INDEX} takes {name} from {library!r}: code from a model folder is never run; only "
                    f"classes of {' and '.join(_TRUSTED_LIBRARIES)} are loaded"
                )
        if self.pipeline_class not in self.adapter.pipelines:
            raise UserError(
                f"{self.place} is a {self.pipeline_class}; supported for {self.adapter.transformer}: "
                f"{', '.join(self.adapter.pipelines)}"
            )
        self._absent()
        files.check()
        for part in files.models:
            check_unquantised(files, part)
        if scheduler := self._scheduler_class():
            check_scheduler(self.place, scheduler, self.scheduler_config(), self.pipeline_class)
        self.transformer_files = files.tensor_files(TRANSFORMER)

    def _absent(self) -> dict[str, None]:
        """The components that the pipeline's class takes and that are null. Raises `UserError` for needed ones."""
        import diffusers

        parameters = inspect.signature(getattr(diffusers, self.pipeline_class).__init__).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty][1:]
        absent = [name for name in needed if name not in self.files.components]
        for name in absent:
            if name not in self.adapter.optional_components:
                raise UserError(
                    f"{self.place}/{INDEX} gives no {name} (null), which a {self.pipeline_class} needs; get a complete "
                    "copy"
                )
        return dict.fromkeys(absent)

    def _sha256(self, name: str) -> str:
        """The sha256 of a file's content, the same wherever the file lies.

        Weights in a bucket are read for it only where their writer left none, in constant memory.
        """
        if self.store is None or not name.endswith(WEIGHTS):
            return file_sha256(self.folder / name)
        if (key := self._hash_key(name)) not in self.hashes:
            self.hashes[key] = self.store.sha256(name) or self._sha256_of_content(name)
        return self.hashes[key]

    def _hash_key(self, name: str) -> str:
        """Another content under the same URL has another tag."""
        return f"{self.place}/{name} {self.files.listed[name].tag}"

    def _sha256_of_content(self, name: str) -> str:
        assert self.store is not None
        size, tag = self.files.listed[name]
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
        loaded = {*self.transformer_files.values(), *self.files.part_files().values()}
        names = sorted(n for n in loaded if n.endswith(WEIGHTS) and self._hash_key(n) not in self.hashes)
        left = dict(zip(names, parallel_map(self.store.sha256, names), strict=True))
        self.hashes |= {self._hash_key(name): sha256 for name, sha256 in left.items() if sha256}
        return sum(self.files.listed[name].size for name, sha256 in left.items() if not sha256)

    def sha256(self) -> str:
        """One hash over the transformer's configuration and weights, by which a result identifies its teacher."""
        digest = hashlib.sha256((self.folder / "transformer" / "config.json").read_bytes())
        for sha256 in parallel_map(self._sha256, sorted(set(self.transformer_files.values()))):
            digest.update(sha256.encode())
        return digest.hexdigest()

    def part_hashes(self) -> dict[str, str]:
        """The sha256 of all files of the pipeline's other parts (text encoders, tokenizer, VAE, scheduler), by path.

        Of what links lead to, and by the names without a variant.
        """
        names = self.part_files()
        return dict(zip(names, parallel_map(self._sha256, list(names.values())), strict=True))

    def part_files(self) -> dict[str, str]:
        """The files of the pipeline's parts beside the transformer, by the names that they have without a variant."""
        return self.files.part_files()

    def pixels_a_token(self) -> int:
        """The side of a token in an image, pixels: what the VAE shrinks by, times the patches of 2."""
        return 2 * vae_shrinks_by(self.vae_config())

    def largest_side(self) -> int | None:
        """The longest side of an image that has positions, pixels; None where any has."""
        most = self.config().get("pos_embed_max_size")
        return most * self.pixels_a_token() if most else None

    def vae_config(self) -> dict[str, Any]:
        return self.files.json("vae/config.json")

    def component_parameters(self) -> dict[str, int]:
        """The parameters of the pipeline's other parts, by name, from the headers of their files alone."""
        return {
            part: sum(math.prod(t.shape) for file in self._weight_files(part) for t in self.files.header(file).values())
            for part in self.files.models
            if part != TRANSFORMER
        }

    def _weight_files(self, part: str) -> list[str]:
        return sorted(name for name in self.files.weights[part].files.values() if name.endswith(WEIGHTS))

    def versions(self) -> dict[str, str]:
        """By file, what changes with its content and is had without reading it: size and times, or an object's tag.

        Of a bucket as it is now, which may be another than was listed when the teacher was opened.
        """
        return self.files.versions()

    def with_weights(self, transformer: bool = True, others: bool = True) -> Path:
        """The folder on this node with weights, of the transformer and of the other parts; downloads missing ones."""
        if not self.store:
            return self.folder
        parts = [part for part in self.files.models if (transformer if part == TRANSFORMER else others)]
        weights = {name for part in parts for name in self._weight_files(part)}
        small = self.files.small_names()
        return self.store.snapshot([*small, *sorted(weights - set(small))], dict(self.files.listed))

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32, transformer_only: bool = False) -> Any:
        """The stock diffusers pipeline. The transformer's parameters do not require gradients.

        `transformer_only`: without the text encoders and the VAE, which only drawing images needs.
        """
        import diffusers

        check_names(self.files, TRANSFORMER, self.empty_transformer())
        others = [part for part in self.files.models if part != TRANSFORMER]
        left_out = self._absent() | (dict.fromkeys(others) if transformer_only else {})
        pipeline_class = getattr(diffusers, self.pipeline_class)
        pipeline = pipeline_class.from_pretrained(
            self.with_weights(others=not transformer_only),
            dtype=dtype,
            variant=self.files.variant_of([TRANSFORMER] if transformer_only else self.files.models),
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
            **self._absent() | {TRANSFORMER: None},
            dtype=dtype,
            variant=self.files.variant_of(part for part in self.files.models if part != TRANSFORMER),
            use_safetensors=True,
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def config(self) -> dict[str, Any]:
        return self.files.json("transformer/config.json")

    def scheduler_config(self) -> dict[str, Any]:
        return self.files.json("scheduler/scheduler_config.json")

    def _scheduler_class(self) -> str | None:
        return self.files.components.get("scheduler", (None, None))[1]

    def scheduler(self) -> Any:
        """The pipeline's own scheduler, as stored: of one of the classes in `ppcl.models.schedulers`."""
        import diffusers

        name = self._scheduler_class()
        if name is None:
            raise UserError(f"{self.place}/{INDEX} names no scheduler; get a complete copy of the pipeline")
        return getattr(diffusers, name).from_config(self.scheduler_config())

    def check_sigmas(self) -> None:
        """Raise `UserError` where the scheduler takes no sigmas from `sampling.arguments`."""
        if name := self._scheduler_class():
            check_scheduler(self.place, name, self.scheduler_config(), self.pipeline_class, sigmas=True)

    def few_step_note(self, steps: int) -> str | None:
        """A warning where the teacher looks distilled for fewer steps than these; None elsewhere."""
        scheduler = self.scheduler_config() if self._scheduler_class() else {}
        return few_step_note(self.place, self.files.pipeline_index, self.config(), scheduler, steps)

    def empty_transformer(self) -> ModelMixin:
        """The transformer with all its parameters on the meta device: structure without memory.

        Raises `UserError` where it does not have what its record names.
        """
        import diffusers

        with init_empty_weights():
            model = getattr(diffusers, self.adapter.transformer).from_config(self.config()).eval()
        check_record(model)
        return model

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
        check_names(self.files, TRANSFORMER, model)
        count = len(self.adapter.blocks(model))
        keep = set(range(count)) if keep is None else set(keep)
        dropped = [self._prefix(model, block) for block in range(count) if block not in keep]
        blocks = self.adapter.blocks(model)
        layouts = {block: self.adapter.layout_at(model, block) for block in range(count) if block not in keep}
        swap(model, {b: IdentityBlock(self.adapter, layout, blocks[b]) for b, layout in layouts.items()})
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
                raise UserError(not_finite(self.files, self.transformer_files[name], name))
            # Without `dtype`, accelerate would convert it to the type of the empty structure.
            set_module_tensor_to_device(
                model, name, device, tensor, dtype=dtype if tensor.is_floating_point() else None
            )
            if prepare and (block := waiting.complete(name)):
                prepare(block.requires_grad_(False))
        return model.requires_grad_(False)

    def _prefix(self, model: nn.Module, block: int) -> str:
        """A block's prefix in the names of its tensors, such as `transformer_blocks.3.`."""
        for name, span in zip(self.adapter.block_lists, self.adapter.block_ranges(model), strict=True):
            if block in span:
                return f"{name}.{block - span.start}."
        raise UserError(f"block {block} does not exist in {self.place}")

    def _tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        by_file: dict[str, list[str]] = {}
        for name, file in self.transformer_files.items():
            if wanted(name):
                by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            if self.store:
                yield from self.files.remote_weights(file).tensors(names)
                continue
            with open_weights(self.folder / file) as opened:
                for name in names:
                    yield name, opened.get_tensor(name)


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
