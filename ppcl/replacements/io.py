"""What stands in for parts of the teacher: as modules in a transformer's block lists, and as files.

Saved as safetensors, one file an entry of the plan, named by it; the structure comes from the teacher, so a file holds
tensors and a few words only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.errors import UserError
from ppcl.models import Architecture, PassThrough, Streams
from ppcl.models.teacher import Teacher
from ppcl.replacements import Basis, FfnMaps, NarrowFfn, RunBlock, RunStart, TextProjectors, other_ffn, text_run
from ppcl.replacements.plan import Entry, Ffn, Fold, Interval, TextRun, named, order, written
from ppcl.replacements.student_block import Student
from ppcl.storage.tensor_files import save_tensors

_FORMAT = "ppcl-replacement-1"

Replacement = Student | TextProjectors | FfnMaps | NarrowFfn | Basis


def placed(
    architecture: Architecture,
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    modules: Mapping[Entry, nn.Module],
    plan: Iterable[Entry],
) -> dict[int, nn.Module]:
    """What stands at which block number with a plan on; the blocks not named stay the teacher's.

    `blocks`: the teacher's own, by number; `transformer` tells where their parts are. A variant keeps the block lists at
    their length: a student stands at `u`, pass-throughs at `u+1..v`, views of the teacher's blocks elsewhere.
    """
    plan = sorted(plan, key=order)
    ffns = {entry.block: modules[entry] for entry in plan if isinstance(entry, Ffn)}
    through = PassThrough(architecture)
    standing: dict[int, nn.Module] = {}
    for number, maps in ffns.items():
        standing[number] = other_ffn(architecture, blocks[number], architecture.parts_of(transformer, number, blocks[number]), maps)
    for entry in plan:
        if isinstance(entry, Interval):
            standing |= dict.fromkeys(entry.blocks[1:], through)
            standing[entry.first] = modules[entry]
        elif isinstance(entry, TextRun):
            own = {number: blocks[number] for number in entry.blocks}
            inside = {number: maps for number, maps in ffns.items() if number in own}
            parts = architecture.parts_of(transformer, entry.first, blocks[entry.first])
            standing |= text_run(architecture, own, parts, modules[entry], inside)
    if any(isinstance(entry, Fold) for entry in plan):
        for number, block in enumerate(blocks):
            here = standing.get(number, block)
            if not isinstance(here, PassThrough):
                standing[number] = modules[Fold()].folded(here, _modulations(architecture, transformer, number, block, here))
    return standing


def _modulations(
    architecture: Architecture, transformer: nn.Module, number: int, block: nn.Module, here: nn.Module
) -> list[str]:
    """Where the modulations are of what stands at a block's number."""
    inside = "block." if isinstance(here, Student | RunStart | RunBlock) else ""
    return [inside + where.modulation for where in architecture.parts_of(transformer, number, block).values()]


def files_in(folder: Path) -> dict[Entry, Path]:
    """The replacements of a folder by entry, from their files' names: `05-07.safetensors`, `text-01-03.safetensors`."""
    found = {named(path.stem): path for path in sorted(folder.glob("*.safetensors"))}
    found.pop(None, None)
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def save(module: Replacement, entry: Entry, architecture: Architecture, path: Path) -> None:
    """Write a replacement's tensors; the file appears whole or not at all."""
    words = {"format": _FORMAT, "transformer": architecture.transformer, "entry": str(entry)}
    if isinstance(module, Student):
        words["source"] = str(module.source)
    save_tensors(path, module.state_dict(), words)


def load(path: Path, teacher: Teacher, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Replacement:
    """Read a replacement. Raises `UserError` where the file is damaged or of another architecture."""
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the replacement {path} cannot be read as safetensors ({error}); run ppcl compress again") from None
    architecture = teacher.architecture
    if words.get("format") != _FORMAT or words.get("transformer") != architecture.transformer:
        raise UserError(
            f"{path} is no replacement for a {architecture.transformer}: it says format {words.get('format')!r}, "
            f"transformer {words.get('transformer')!r}"
        )
    try:
        (entry,) = written(words["entry"])
        module = _empty(entry, words, tensors, teacher)
        module.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError):
        raise UserError(
            f"the replacement {path} does not fit the teacher in {teacher.place}: its tensors are not those of one of the "
            "teacher's parts; give the teacher it was made from, or run ppcl compress again"
        ) from None
    return module.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _empty(entry: Entry, words: Mapping[str, str], tensors: Mapping[str, torch.Tensor], teacher: Teacher) -> nn.Module:
    """The structure of a replacement, without weights."""
    if isinstance(entry, Interval):
        source = int(words["source"])
        block = _as_stored(teacher, source, tensors)
        affine = {
            stream: nn.Linear(*reversed(tensors[f"affine.{stream}.weight"].shape), device="meta")
            for stream in Streams._fields
            if f"affine.{stream}.weight" in tensors
        }
        return Student(teacher.architecture, entry, source, block, affine)
    width = next((t.shape[0] for name, t in tensors.items() if name.endswith("weight")), 0)
    with torch.device("meta"):
        if isinstance(entry, TextRun):
            return TextProjectors(entry, width, "h.weight" in tensors)
        if isinstance(entry, Fold):
            return Basis(*tensors["directions"].shape)
        if entry.kept:
            shapes = {stream: tensors[f"up.{stream}.weight"].shape for stream in Streams._fields if f"up.{stream}.weight" in tensors}
            return NarrowFfn({stream: (nn.Linear(d, k), nn.Linear(k, d)) for stream, (k, d) in shapes.items()})
        return FfnMaps({stream: nn.Linear(width, width) for stream in Streams._fields if f"{stream}.weight" in tensors})


def _as_stored(teacher: Teacher, source: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The structure of a student's block: the teacher's block `source`, with as many hidden units as its file has."""
    architecture, model = teacher.architecture, teacher.empty_transformer()
    block = architecture.blocks(model)[source]
    for where in architecture.parts_of(model, source, block).values():
        for name in (architecture.ffn_up, architecture.ffn_down):
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
        raise UserError(f"the replacement {path} cannot be read as safetensors ({error}); run ppcl compress again") from None
    return sizes
