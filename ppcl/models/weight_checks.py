"""Hold the weights of a pipeline against its configurations, from the headers of its files, before anything runs."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ppcl.errors import UserError
from ppcl.models.pipeline_files import PipelineFiles, TensorHeader
from ppcl.storage.scratch import private_temporary

TRANSFORMER = "transformer"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Counters and masks that text encoders keep beside their weights.
_COUNTS = ("I64", "I32", "BOOL")
# Diffusers renames the attention of old VAEs when it loads them.
_RENAMED = ("query.weight", "proj_attn.weight")
# What no embedding depends on, so that some leave it out.
_UNUSED = ("lm_head.weight",)
# Of the first numbers of a tensor, read to see whether its numbers are finite.
_SAMPLED = 4096
_LONGEST_REASON = 200
_UNQUANTISED = "give the weights in bfloat16, float16 or float32 (load them, call dequantize, save_pretrained)"


def check_weights(files: PipelineFiles) -> None:
    """Check names, shapes and types of all weights, and on this machine the first numbers of each for NaN.

    Cost: the headers, by ranged reads from a bucket, and at most 4,096 numbers of a tensor; the structures of all
    models are made without memory, and tokenizers are loaded. Raises `UserError`: the file, the tensor, the value
    seen, what to do.
    """
    for part in files.models:
        check_unquantised(files, part)
    for part in files.models:
        found = _headers(files, part)
        library, class_name = files.components[part]
        if library == "diffusers":
            model = _empty(files, part, class_name)
            check_names(files, part, model)
            _check_shapes(files, part, model, found)
        else:
            _check_text_encoder(files, part, class_name)
        if files.store is None:
            _check_finite(files, found)
    for part, (_, class_name) in files.components.items():
        if part.startswith("tokenizer"):
            _check_tokenizer(files, part, class_name)


def check_unquantised(files: PipelineFiles, part: str) -> None:
    """Refuse a model whose configuration says that it is quantised. Raises `UserError`."""
    config = files.json(f"{part}/config.json")
    text = config.get("text_config")
    given = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if given:
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise UserError(
            f"{files.place}/{part}/config.json says that the weights are quantised (quantization_config: {method}); "
            f"{_UNQUANTISED}"
        )


def check_names(files: PipelineFiles, part: str, model: nn.Module) -> None:
    """Refuse parameters that the files of a model lack, and of a transformer tensors that it does not have.

    `model`: its structure. Buffers may be missing, since the model makes them itself. Raises `UserError`.
    """
    tensors = files.tensor_files(part)
    if any(name.endswith(_RENAMED) for name in tensors):
        return
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    if missing:
        raise UserError(
            f"{files.place}/{part} lacks {len(missing)} weights, the first being {missing[0]}; get a complete copy, or "
            "the config.json that belongs to it"
        )
    known = set(model.state_dict())
    extra = sorted(name for name in tensors if name not in known)
    # A longer model would be cut off without a word.
    if extra and part == TRANSFORMER:
        raise UserError(
            f"{files.place}/{tensors[extra[0]]} holds {extra[0]}, one of {len(extra)} tensors that the "
            f"{type(model).__name__} of {part}/config.json does not have; get the config.json that belongs to the "
            "weights"
        )


def _headers(files: PipelineFiles, part: str) -> dict[str, tuple[str, TensorHeader]]:
    """The file and the header of each tensor of a model. Raises `UserError` for types that are not served."""
    by_tensor = files.tensor_files(part)
    by_file = {file: files.header(file) for file in sorted(set(by_tensor.values()))}
    allowed = _FLOATS if part == TRANSFORMER else (*_FLOATS, *_COUNTS)
    for file, header in by_file.items():
        for name, tensor in header.items():
            if tensor.dtype not in allowed:
                raise UserError(f"{files.place}/{file}: the tensor {name} has the type {tensor.dtype}; {_UNQUANTISED}")
    for name, file in by_tensor.items():
        if name not in by_file[file]:
            raise UserError(
                f"{files.place}/{file} has no tensor {name}, which the index of the weights names; get an intact copy "
                "of it"
            )
    return {name: (file, by_file[file][name]) for name, file in by_tensor.items()}


def _empty(files: PipelineFiles, part: str, class_name: str) -> nn.Module:
    """The structure of a model without memory. Raises `UserError` where its configuration gives none."""
    import diffusers

    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        raise UserError(
            f"{files.place}/model_index.json names {class_name} for {part}, which diffusers {diffusers.__version__} "
            "does not have; install the diffusers that wrote the folder, or a newer one"
        )
    try:
        with init_empty_weights():
            return model_class.from_config(files.json(f"{part}/config.json"))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"{files.place}/{part}/config.json does not describe a {class_name} ({' '.join(str(error).split())}); get "
            "an intact copy of it"
        ) from None


def _check_shapes(
    files: PipelineFiles, part: str, model: nn.Module, found: Mapping[str, tuple[str, TensorHeader]]
) -> None:
    expected = model.state_dict()
    for name, (file, tensor) in found.items():
        if name in expected and tuple(expected[name].shape) != tensor.shape:
            raise UserError(
                f"{files.place}/{file}: the tensor {name} has the shape {_shape(tensor.shape)}, and the "
                f"{type(model).__name__} of {part}/config.json takes {_shape(expected[name].shape)}; get the "
                "config.json that belongs to the weights"
            )


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape)) or "of a single number"


def _check_text_encoder(files: PipelineFiles, part: str, class_name: str) -> None:
    """Have transformers load the names and shapes alone: it renames tensors, and draws missing ones at random."""
    import transformers
    from transformers.utils import logging

    place = f"{files.place}/{part}"
    weights = files.weights[part]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with _skeleton(files, part) as folder:
            _, info = getattr(transformers, class_name).from_pretrained(
                folder,
                device_map="meta",
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{place} cannot be loaded as a {class_name} ({reason}); get an intact copy of it") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if missing := sorted(name for name in info["missing_keys"] if not name.endswith(_UNUSED)):
        raise UserError(
            f"{place} lacks {len(missing)} weights of a {class_name}, the first being {missing[0]}; get a complete "
            "copy, or the config.json that belongs to it"
        )
    for name, seen, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{place}: the tensor {name} has the shape {_shape(seen)}, and the {class_name} of {part}/config.json "
            f"takes {_shape(expected)}; get the config.json that belongs to the weights"
        )


def _check_tokenizer(files: PipelineFiles, part: str, class_name: str) -> None:
    """Load a tokenizer, whose vocabulary must be there: transformers would go on without words."""
    import transformers

    place, folder = f"{files.place}/{part}", files.folder / part
    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
        # In one file, or in those of older versions.
        forms = dict(tokenizer.vocab_files_names)
        whole = forms.pop("tokenizer_file", "tokenizer.json")
    # The library of tokenizers raises plain exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(f"{place} cannot be loaded as a {class_name} ({reason}); get an intact copy of it") from None
    missing = [name for name in forms.values() if not (folder / name).exists()]
    if not (folder / whole).exists() and (missing or not forms):
        raise UserError(
            f"{place} holds neither {whole} nor {' and '.join(missing) or 'another form'}; get a complete copy"
        )


@contextmanager
def _skeleton(files: PipelineFiles, part: str) -> Iterator[Path]:
    """A component's folder whose weights have their headers; of a bucket the numbers are holes, which take no room."""
    if files.store is None:
        yield files.folder / part
        return
    with private_temporary() as folder:
        weights = set(files.weights[part].files.values())
        for name in {f"{part}/config.json", *weights}:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith(".safetensors"):
                path.write_bytes((files.folder / name).read_bytes())
                continue
            remote = files.remote_weights(name)
            header = json.dumps(remote.header).encode()
            header += b" " * (-len(header) % 8)
            end = max((entry["data_offsets"][1] for entry in remote.header.values()), default=0)
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(8 + len(header) + end)
        yield folder / part


def _check_finite(files: PipelineFiles, found: Mapping[str, tuple[str, TensorHeader]]) -> None:
    by_file: dict[str, list[tuple[str, TensorHeader]]] = {}
    for name, (file, tensor) in found.items():
        if tensor.dtype in _FLOATS and 0 not in tensor.shape:
            by_file.setdefault(file, []).append((name, tensor))
    for file, tensors in by_file.items():
        with open(files.folder / file, "rb") as opened:
            for name, tensor in tensors:
                dtype = _FLOATS[tensor.dtype]
                opened.seek(tensor.start)
                count = min(math.prod(tensor.shape), _SAMPLED)
                numbers = torch.frombuffer(bytearray(opened.read(count * dtype.itemsize)), dtype=dtype)
                if not numbers.isfinite().all():
                    raise UserError(not_finite(files, file, name))


def not_finite(files: PipelineFiles, file: str, name: str) -> str:
    return f"the weight {name} in {files.place}/{file} has NaN or infinite values; get an intact copy of it"
