"""What stands in for parts of the teacher: as modules in a transformer's block lists, and as files.

Saved as safetensors, one file an replacement of the plan, named by it; the structure comes from the teacher, so a file holds
tensors and a few metadata only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.errors import UserError
from ppcl.models import IdentityBlock, ModelAdapter, Streams
from ppcl.models.teacher import Teacher
from ppcl.replacements import (
    LinearFfn,
    ModulationBasis,
    PrunedFfn,
    RunBlock,
    RunStart,
    TextProjectors,
    text_run,
    with_ffn,
)
from ppcl.replacements.plan import (
    Ffn,
    Interval,
    LowRankModulation,
    Replacement,
    TextRun,
    parse_name,
    parse_text,
    sort_key,
)
from ppcl.replacements.student_block import StudentBlock
from ppcl.storage.tensor_files import save_tensors

_FORMAT = "ppcl-replacement-1"

ReplacementModule = StudentBlock | TextProjectors | LinearFfn | PrunedFfn | ModulationBasis


def block_map(
    adapter: ModelAdapter,
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    modules: Mapping[Replacement, nn.Module],
    plan: Iterable[Replacement],
) -> dict[int, nn.Module]:
    """What stands at which block number with a plan on; the blocks not named stay the teacher's.

    `blocks`: the teacher's own, by number; `transformer` tells where their parts are. A variant keeps the block lists at
    their length: a student stands at `u`, pass-throughs at `u+1..v`, views of the teacher's blocks elsewhere.
    """
    plan = sorted(plan, key=sort_key)
    ffns = {replacement.block: modules[replacement] for replacement in plan if isinstance(replacement, Ffn)}
    through = IdentityBlock(adapter)
    standing: dict[int, nn.Module] = {}
    for number, maps in ffns.items():
        standing[number] = with_ffn(
            adapter, blocks[number], adapter.parts_of(transformer, number, blocks[number]), maps
        )
    for replacement in plan:
        if isinstance(replacement, Interval):
            standing |= dict.fromkeys(replacement.blocks[1:], through)
            standing[replacement.first] = modules[replacement]
        elif isinstance(replacement, TextRun):
            own = {number: blocks[number] for number in replacement.blocks}
            inside = {number: maps for number, maps in ffns.items() if number in own}
            parts = adapter.parts_of(transformer, replacement.first, blocks[replacement.first])
            standing |= text_run(adapter, own, parts, modules[replacement], inside)
    if any(isinstance(replacement, LowRankModulation) for replacement in plan):
        for number, block in enumerate(blocks):
            here = standing.get(number, block)
            if not isinstance(here, IdentityBlock):
                standing[number] = modules[LowRankModulation()].folded(
                    here, _modulations(adapter, transformer, number, block, here)
                )
    return standing


def _modulations(
    adapter: ModelAdapter, transformer: nn.Module, number: int, block: nn.Module, here: nn.Module
) -> list[str]:
    """Where the modulations are of what stands at a block's number."""
    inside = "block." if isinstance(here, StudentBlock | RunStart | RunBlock) else ""
    return [inside + where.modulation for where in adapter.parts_of(transformer, number, block).values()]


def files_in(folder: Path) -> dict[Replacement, Path]:
    """The replacements of a folder by replacement, from their files' names: `05-07.safetensors`, `text-01-03.safetensors`."""
    return replacement_files(folder.glob("*.safetensors"))


def replacement_files(paths: Iterable[Path]) -> dict[Replacement, Path]:
    """Those of some files that are replacements, by replacement, from their names; the others are left out."""
    found = {parse_name(path.stem): path for path in sorted(paths) if path.suffix == ".safetensors"}
    found.pop(None, None)
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def save_replacement(module: ReplacementModule, replacement: Replacement, adapter: ModelAdapter, path: Path) -> None:
    """Write a replacement's tensors; the file appears whole or not at all."""
    metadata = {"format": _FORMAT, "transformer": adapter.transformer, "entry": str(replacement)}
    if isinstance(module, StudentBlock):
        metadata["source"] = str(module.source)
    save_tensors(path, module.state_dict(), metadata)


def load_replacement(
    path: Path, teacher: Teacher, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ReplacementModule:
    """Read a replacement. Raises `UserError` where the file is damaged or of another adapter."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the replacement {path} cannot be read as safetensors ({error}); run ppcl compress again"
        ) from None
    adapter = teacher.adapter
    if metadata.get("format") != _FORMAT or metadata.get("transformer") != adapter.transformer:
        raise UserError(
            f"{path} is no replacement for a {adapter.transformer}: it says format {metadata.get('format')!r}, "
            f"transformer {metadata.get('transformer')!r}"
        )
    try:
        (replacement,) = parse_text(metadata["entry"])
        module = _empty(replacement, metadata, tensors, teacher)
        module.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError):
        raise UserError(
            f"the replacement {path} does not fit the teacher in {teacher.place}: its tensors are not those of one of the "
            "teacher's parts; give the teacher it was made from, or run ppcl compress again"
        ) from None
    return module.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _empty(
    replacement: Replacement, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], teacher: Teacher
) -> nn.Module:
    """The structure of a replacement, without weights."""
    if isinstance(replacement, Interval):
        source = int(metadata["source"])
        block = _as_stored(teacher, source, tensors)
        affine = {
            stream: nn.Linear(*reversed(tensors[f"affine.{stream}.weight"].shape), device="meta")
            for stream in Streams._fields
            if f"affine.{stream}.weight" in tensors
        }
        return StudentBlock(teacher.adapter, replacement, source, block, affine)
    width = next((t.shape[0] for name, t in tensors.items() if name.endswith("weight")), 0)
    with torch.device("meta"):
        if isinstance(replacement, TextRun):
            return TextProjectors(replacement, width, "h.weight" in tensors)
        if isinstance(replacement, LowRankModulation):
            return ModulationBasis(*tensors["directions"].shape)
        if replacement.keep_percent:
            shapes = {
                stream: tensors[f"up.{stream}.weight"].shape
                for stream in Streams._fields
                if f"up.{stream}.weight" in tensors
            }
            return PrunedFfn({stream: (nn.Linear(d, k), nn.Linear(k, d)) for stream, (k, d) in shapes.items()})
        return LinearFfn(
            {stream: nn.Linear(width, width) for stream in Streams._fields if f"{stream}.weight" in tensors}
        )


def _as_stored(teacher: Teacher, source: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The structure of a student's block: the teacher's block `source`, with as many hidden units as its file has."""
    adapter, model = teacher.adapter, teacher.empty_transformer()
    block = adapter.blocks(model)[source]
    for where in adapter.parts_of(model, source, block).values():
        for name in (adapter.ffn_up, adapter.ffn_down):
            rows, columns = tensors[f"block.{where.ffn}.{name}.weight"].shape
            block.set_submodule(f"{where.ffn}.{name}", nn.Linear(columns, rows, device="meta"))
    return block


def stored_sizes(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a file, from its header alone."""
    sizes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                sizes[name] = 1
                for length in file.get_slice(name).get_shape():
                    sizes[name] *= length
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the replacement {path} cannot be read as safetensors ({error}); run ppcl compress again"
        ) from None
    return sizes
