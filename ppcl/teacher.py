"""The teacher: a diffusers pipeline folder, read safely, whole or only the blocks a worker needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.architecture import Architecture, PassThrough, architecture_of, swap
from ppcl.errors import UserError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRUSTED_LIBRARIES = ("diffusers", "transformers")


class Teacher:
    """A pipeline folder that has been looked at: its files, classes and architecture, no weights loaded yet.

    Raises `UserError` where the folder is no diffusers pipeline, its transformer is not supported, it wants code of its
    own, or its weights are pickles.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        index = _read_json(self.folder / "model_index.json", self.folder)
        entry = index.get("transformer")
        if not entry:
            raise UserError(f"{self.folder} is a {index.get('_class_name')}, which has no transformer; point to an MMDiT pipeline")
        self.architecture: Architecture = architecture_of(entry[1])
        self.pipeline_class: str = index["_class_name"]
        for name, value in index.items():
            if isinstance(value, list) and value[0] is not None and value[0] not in _TRUSTED_LIBRARIES:
                raise UserError(
                    f"{self.folder}/model_index.json takes {name} from {value[0]!r}: code from a model folder is never "
                    f"run; only classes of {' and '.join(_TRUSTED_LIBRARIES)} are loaded"
                )
        if self.pipeline_class not in self.architecture.pipelines:
            raise UserError(
                f"{self.folder} is a {self.pipeline_class}; supported for {self.architecture.transformer}: "
                f"{', '.join(self.architecture.pipelines)}"
            )
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in _PICKLES:
                raise UserError(
                    f"{path} is a pickle, which can run code when it is loaded; convert the weights to safetensors "
                    "(save_pretrained with safe_serialization) and remove the file"
                )
        self.transformer_files = self._transformer_files()

    def _transformer_files(self) -> dict[str, Path]:
        """Where each tensor of the transformer lies: name to safetensors file."""
        folder = self.folder / "transformer"
        sharded = folder / "diffusion_pytorch_model.safetensors.index.json"
        if sharded.exists():
            names = _read_json(sharded, folder)["weight_map"]
            return {name: folder / file for name, file in names.items()}
        single = folder / "diffusion_pytorch_model.safetensors"
        if not single.exists():
            raise UserError(f"{folder} holds no diffusion_pytorch_model.safetensors; save the transformer as safetensors")
        with _open(single) as file:
            return {name: single for name in file.keys()}  # noqa: SIM118  (not a dictionary)

    def sha256(self) -> str:
        """One hash over the transformer's configuration and weights: what a result refers to its teacher by."""
        digest = hashlib.sha256((self.folder / "transformer" / "config.json").read_bytes())
        for path in sorted(set(self.transformer_files.values())):
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()

    def part_hashes(self) -> dict[str, str]:
        """The sha256 of every file of the pipeline's other parts (text encoders, tokenizers, VAE, scheduler), by its path."""
        index = _read_json(self.folder / "model_index.json", self.folder)
        parts = [name for name, value in index.items() if isinstance(value, list) and name != "transformer"]
        files = [path for part in sorted(parts) for path in sorted((self.folder / part).rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): file_sha256(path) for path in files}

    def pipeline(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The stock diffusers pipeline, loaded whole."""
        import diffusers

        pipeline_class = getattr(diffusers, self.pipeline_class)
        pipeline = pipeline_class.from_pretrained(
            self.folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def pipeline_without_transformer(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The stock pipeline with `transformer=None`: enough to encode prompts and pictures."""
        import diffusers

        pipeline_class = getattr(diffusers, self.pipeline_class)
        pipeline = pipeline_class.from_pretrained(
            self.folder, transformer=None, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def config(self) -> dict[str, Any]:
        return _read_json(self.folder / "transformer" / "config.json", self.folder)

    def empty_transformer(self) -> nn.Module:
        """The transformer with all its parameters on the meta device: structure without memory."""
        import diffusers

        with init_empty_weights():
            return getattr(diffusers, self.architecture.transformer).from_config(self.config()).eval()

    def transformer(
        self, keep: Collection[int] | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The transformer with the blocks `keep` (all by default), everything else of it being embedders and head.

        Only the kept tensors are read from the safetensors files. At the other blocks' places stand pass-throughs, so a
        rank's memory is its own blocks. Parameters do not require gradients. Raises `UserError` for NaN or Inf weights.
        """
        model = self.empty_transformer()
        count = len(self.architecture.blocks(model))
        keep = set(range(count)) if keep is None else set(keep)
        dropped = [self._prefix(model, block) for block in range(count) if block not in keep]
        through = PassThrough(self.architecture)
        swap(model, {block: through for block in range(count) if block not in keep})
        for name, tensor in self._tensors(lambda n: not n.startswith(tuple(dropped)) if dropped else True):
            if not tensor.isfinite().all():
                raise UserError(
                    f"the weight {name} in {self.transformer_files[name]} has NaN or infinite values; get an intact copy of it"
                )
            set_module_tensor_to_device(model, name, device, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise UserError(f"{self.folder}/transformer lacks {len(missing)} weights, the first being {missing[0]}")
        return model.requires_grad_(False)

    def _prefix(self, model: nn.Module, block: int) -> str:
        """A block's prefix in the names of its tensors, such as `transformer_blocks.3.`."""
        for name, span in zip(self.architecture.block_lists, self.architecture.spans(model), strict=True):
            if block in span:
                return f"{name}.{block - span.start}."
        raise UserError(f"block {block} does not exist in {self.folder}")

    def _tensors(self, wanted: Any) -> Iterator[tuple[str, torch.Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name, path in self.transformer_files.items():
            if wanted(name):
                by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with _open(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{folder} is no diffusers pipeline folder: {path.name} is missing; point to a folder written by save_pretrained")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); get an intact copy of it") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); get an intact copy of it") from None
