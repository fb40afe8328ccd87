"""Reading a LoRA: diffusers converts what it knows, PEFT says which layer is where, and all of it is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.models.lora_linear import update_norm
from ppcl.storage.mirror import local_file

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher

_ADAPTER = "read"
_TRANSFORMER = "transformer."


@dataclass(frozen=True)
class LoraLayer:
    """The update `scale · (up down)` of one linear map: `down (r, p)`, `up (q, r)`, `bias (q,)` or None."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return abs(self.scale) * update_norm(self.down, self.up)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA of one teacher. `layers`: by the path of the linear map in the transformer. `place`: where it was read."""

    place: str
    layers: dict[str, LoraLayer] = field(repr=False)


def read_lora(place: LocationLike, teacher: Teacher) -> Lora:
    """Read a LoRA file of this machine or of a bucket, in any layout that diffusers converts for the teacher's family.

    Raises `UserError` for what is no LoRA, is of another family or another size, or changes more than linear maps.
    """
    location = Location.of(place)
    if not str(location).endswith(".safetensors"):
        raise UserError(f"the LoRA {location} is no .safetensors file; other formats can run code when they are loaded")
    path = local_file(location)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"the LoRA {location} cannot be read as safetensors ({error}); get an intact copy") from None
    if other := next((name for name in names if "lokr_" in name or "dora_scale" in name or "hada_" in name), None):
        raise UserError(f"the LoRA {location} holds {other}: only plain LoRAs are supported, no DoRA, LoKr or LoHa")
    transformer = teacher.empty_transformer()
    with _quiet():
        tensors = _inject(str(path), str(location), transformer, teacher)
    layers = dict(_layers(str(location), tensors, transformer))
    for name, layer in layers.items():
        _check(str(location), name, layer, transformer.get_submodule(name))
    return Lora(str(location), layers)


def _inject(path: str, place: str, transformer: Any, teacher: Teacher) -> dict[str, torch.Tensor]:
    """Put the LoRA's layers into an empty transformer, as diffusers does; gives its tensors by their names there.

    Raises `UserError`.
    """
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    pipeline_class = getattr(diffusers, teacher.pipeline_class)
    try:
        state, metadata = pipeline_class.lora_state_dict(
            path, local_files_only=True, use_safetensors=True, return_lora_metadata=True
        )
        text = next((name for name in state if name.startswith("text_encoder")), None)
        if text:
            raise UserError(
                f"the LoRA {place} changes the text encoder too, with {text}; only LoRAs of the transformer are "
                "supported"
            )
        if not any(".lora_A" in name for name in state):
            state = convert_unet_state_dict_to_peft(state)
        known = {name for name, _ in transformer.named_modules()}
        foreign = [name for name in state if name.removeprefix(_TRANSFORMER).partition(".lora_")[0] not in known]
        if foreign := [name for name in foreign if not name.endswith(".alpha")]:
            raise UserError(
                f"the LoRA {place} changes what a {teacher.adapter.name} of this size does not have, such as "
                f"{foreign[0].removeprefix(_TRANSFORMER)}; give a LoRA of this family and this teacher"
            )
        alphas = {name: state.pop(name) for name in list(state) if name.endswith(".alpha")}
        transformer.load_lora_adapter(
            dict(state),
            adapter_name=_ADAPTER,
            network_alphas=alphas or None,
            metadata=None if alphas else metadata,
            low_cpu_mem_usage=True,
        )
    except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError, SafetensorError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"the LoRA {place} is not one of a {teacher.adapter.name} of this size ({words[:200]}); give a LoRA of "
            "this family, in diffusers' format or one that diffusers converts"
        ) from None
    return {name.removeprefix(_TRANSFORMER): tensor for name, tensor in state.items()}


def _layers(place: str, tensors: dict[str, torch.Tensor], transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that PEFT found a place for; it keeps numbers where the transformer has its own, which is nowhere."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    for name, module in transformer.named_modules():
        if not isinstance(module, PeftLayer):
            continue
        try:
            down, up = (tensors[f"{name}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
        except KeyError as error:
            raise UserError(f"the LoRA {place} lacks the tensor {error.args[0]}; get a complete copy") from None
        yield name, LoraLayer(down, up, module.scaling[_ADAPTER], tensors.get(f"{name}.lora_B.bias"))


def _check(place: str, name: str, layer: LoraLayer, module: Any) -> None:
    base = module.base_layer
    if not isinstance(base, nn.Linear):
        raise UserError(f"the LoRA {place} changes {name}, which is a {type(base).__name__}; only linear maps can be")
    expected, found = (base.out_features, base.in_features), (layer.up.shape[0], layer.down.shape[1])
    if expected != found or layer.up.shape[1] != layer.down.shape[0]:
        raise UserError(
            f"the LoRA {place} is of a model of another size: {name} has {expected[0]} × {expected[1]} numbers here "
            f"and {found[0]} × {found[1]} there; give a LoRA of this teacher"
        )
    if not (layer.down.isfinite().all() and layer.up.isfinite().all()):
        raise UserError(f"the LoRA {place} has NaN or infinite values in {name}; get an intact copy")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and PEFT's own warnings: what is wrong is said in one sentence."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
