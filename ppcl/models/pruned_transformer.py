"""Transformers whose blocks are not all alike: a stock diffusers transformer, and what its configuration says of each.

This file needs torch and diffusers alone. `ppcl export` puts a copy beside the weights of a model that stock diffusers
cannot describe; import it before the model is loaded:

    import sys; sys.path.insert(0, "the model's folder")
    import ppcl_transformer
    pipeline = diffusers.DiffusionPipeline.from_pretrained("the model's folder")

The key `pruned` of `transformer/config.json` describes the blocks:

- `lists`: by attribute of the transformer that holds blocks, one entry a block, in running order, see `_shaped`.
- `parts`: by the same attribute and stream (`img`, `txt`), the paths in a block of `modulation`, `norm1`, `norm2`,
  `ffn`, `up` and `down` (in the FFN), `out` (the attention's output), and `qkv` (what gives its queries, keys and
  values). A single-stream block has `modulation`, `qkv`, `up` (what gives its hidden units) and `fused` (the output map
  of the attention and of the hidden units) alone. `attention`: its path.
- `img`, `txt`: the arguments of a block that take the streams. `returns`: the streams that it returns, in order.
- `width`: that of the streams. `modulation_rank`: the coordinates that all modulations read; null where they read
  their whole input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers looks here for the class that can load)
from torch import nn

_PREFIX = "Pruned"
# The chunks of a modulation: shift, scale and gate of the attention, then those of the FFN.
_SHIFT2, _SCALE2, _GATE2 = 3, 4, 5


class Modulation(nn.Module):
    """A modulation of which some chunks are constants: `(…, p)` to `(…, chunks · width)`.

    `constants`: the value of each chunk that is not computed. `rows` are the linear maps of the runs that are.
    """

    def __init__(self, features: int, width: int, chunks: int, constants: Mapping[int, float]):
        super().__init__()
        self.width, self.chunks, self.constants = width, chunks, dict(constants)
        self.rows = nn.ModuleList(nn.Linear(features, count * width) for count in self._runs())

    def _runs(self) -> list[int]:
        """How many chunks are computed together, run by run."""
        runs, before = [], True
        for chunk in range(self.chunks):
            constant = chunk in self.constants
            if not constant and before:
                runs.append(0)
            if not constant:
                runs[-1] += 1
            before = constant
        return runs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        computed = iter([chunk for rows in self.rows for chunk in rows(x).split(self.width, -1)])
        constant = x.new_zeros(*x.shape[:-1], self.width)
        return torch.cat(
            [constant + self.constants[c] if c in self.constants else next(computed) for c in range(self.chunks)], -1
        )


class ModulationBasis(nn.Module):
    """The coordinates of a modulation's input, `(…, d)` to `(…, k)`: `directions (d, k)`, `mean (d,)`."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(width, rank))
        self.mean = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) @ self.directions


class InBasis(nn.Module):
    """A modulation that reads coordinates. The basis is the transformer's, shared by all."""

    basis: ModulationBasis

    def __init__(self, inner: nn.Module, basis: ModulationBasis):
        super().__init__()
        self.inner = inner
        self.__dict__["basis"] = basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.basis(x))


class _ShapedBlock(nn.Module):
    """What the kinds of blocks below share: the class of a stock block is put behind each of them."""

    pruned: Mapping[str, Any]
    stock: type[nn.Module]

    def _arguments(self, arguments: tuple, named: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; gradient checkpointing gives them by position."""
        return named if not arguments else dict(zip(self._names(), arguments, strict=False)) | named

    def _names(self) -> list[str]:
        return list(inspect.signature(self.stock.forward).parameters)[1:]

    def _stock(self, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The streams that the stock forward makes, by name; `img` alone where text and image are one stream."""
        returned = super().forward(**arguments)
        return (
            {"img": returned} if torch.is_tensor(returned) else dict(zip(self.pruned["returns"], returned, strict=True))
        )

    def _returned(self, streams: Mapping[str, torch.Tensor]) -> Any:
        if "txt" not in streams:
            return streams["img"]
        return tuple(streams[name] for name in self.pruned["returns"])


class AffineBlock(_ShapedBlock):
    """A block with a residual affine map `x + W x + b` behind some of its streams (`affine`)."""

    affine: nn.ModuleDict

    def forward(self, *arguments: Any, **named: Any) -> Any:
        streams = self._stock(self._arguments(arguments, named))
        return self._returned({n: x + self.affine[n](x) if n in self.affine else x for n, x in streams.items()})


class RunStart(_ShapedBlock):
    """The first block of a run whose later blocks take the text from here: it sends its text input on as well."""

    def _record(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.__dict__["recorded"] = named[self.pruned["txt"]]

    def forward(self, *arguments: Any, **named: Any) -> tuple:
        attention = self.get_submodule(self.pruned["attention"])
        handle = attention.register_forward_pre_hook(self._record, with_kwargs=True)
        try:
            streams = self._stock(self._arguments(arguments, named))
            streams["txt"] = torch.cat([streams["txt"], self.__dict__.pop("recorded")], dim=-1)
        finally:
            handle.remove()
        return self._returned(streams)


class RunBlock(_ShapedBlock):
    """A later block of a run: the image stream as ever, the text stream as the run's first block left it.

    The last one makes the text stream that goes on, `h + W h + b` (`h`), unless nothing reads it.
    """

    h: nn.Linear

    def forward(self, *arguments: Any, **named: Any) -> tuple:
        given = self._arguments(arguments, named)
        text = self.pruned["txt"]
        h, z = given[text].chunk(2, dim=-1)
        streams = self._stock(given | {text: z})
        streams["txt"] = given[text]
        if self.pruned["block"]["text_run"] == "ends":
            streams["txt"] = h + self.h(h) if self.pruned["block"]["text_goes_on"] else h
        return self._returned(streams)


def _shaped(block: nn.Module, entry: Mapping[str, Any], pruned: Mapping[str, Any], parts: Mapping, basis: Any) -> None:
    """Give a stock block the shape that its entry says.

    An entry may have: `heads`, those of its attention; `hidden`, by stream the hidden units of its FFN; `linear_ffn`,
    the streams whose FFN is one residual linear map; `affine`, the streams with a map behind the block; `text_run`,
    `starts`, `inside` or `ends`, and at its end `text_goes_on`; `streams`, those that are shaped, if not all. `teacher`
    names the teacher's blocks that it stands for, and shapes nothing.
    """
    given = {name: where for name, where in parts.items() if name in entry.get("streams", list(parts))}
    if heads := entry.get("heads"):
        _with_heads(block, heads, pruned["attention"], parts)
    inside_run = entry.get("text_run") in ("inside", "ends")
    for stream, count in entry.get("hidden", {}).items():
        if stream not in given or (inside_run and stream == "txt"):
            continue
        if "fused" in given[stream]:
            up = _linear(block, given[stream]["up"])
            block.set_submodule(given[stream]["up"], nn.Linear(up.in_features, count))
            _with_fewer_inputs(block, given[stream]["fused"], up.out_features - count)
            continue
        ffn = block.get_submodule(given[stream]["ffn"])
        up, down = (_linear(ffn, given[stream][name]) for name in ("up", "down"))
        ffn.set_submodule(given[stream]["up"], nn.Linear(up.in_features, count))
        ffn.set_submodule(given[stream]["down"], nn.Linear(count, down.out_features))
    for stream, where in given.items():
        modulation: Any = block.get_submodule(where["modulation"])
        features, width = modulation.in_features, pruned["width"]
        chunks = modulation.out_features // width
        read = features if basis is None else basis.directions.shape[1]
        if inside_run and stream == "txt":
            block.set_submodule(where["norm1"], nn.Linear(width, width))
            for path in ("norm2", "ffn", "out"):
                block.set_submodule(where[path], nn.Identity())
            modulation = Modulation(read, width, chunks, dict.fromkeys(range(chunks), 0.0))
        elif stream in entry.get("linear_ffn", []):
            block.set_submodule(where["norm2"], nn.Identity())
            block.set_submodule(where["ffn"], nn.Linear(width, width))
            modulation = Modulation(read, width, chunks, {_SHIFT2: 0.0, _SCALE2: 0.0, _GATE2: 1.0})
        elif basis is not None:
            modulation = nn.Linear(read, modulation.out_features)
        else:
            continue
        block.set_submodule(where["modulation"], modulation if basis is None else InBasis(modulation, basis))
    kind: type[_ShapedBlock] | None = None
    if affine := entry.get("affine"):
        width = pruned["width"]
        block.affine = nn.ModuleDict({stream: nn.Linear(width, width) for stream in affine})
        kind = AffineBlock
    if run := entry.get("text_run"):
        kind = RunStart if run == "starts" else RunBlock
        if entry.get("text_goes_on"):
            block.h = nn.Linear(pruned["width"], pruned["width"])
    if kind is not None:
        block.__dict__["pruned"] = {**pruned, "block": entry}
        stock = type(block)
        block.__class__ = type(f"{kind.__name__}Of{stock.__name__}", (kind, stock), {"stock": stock})


def _with_heads(block: nn.Module, heads: int, path: str, parts: Mapping[str, Mapping]) -> None:
    """Give the attention of a stock block fewer heads, in all streams that it reads."""
    attention: Any = block.get_submodule(path)
    before = _linear(block, parts["img"]["qkv"][0]).out_features
    width = heads * (before // attention.heads)
    for where in parts.values():
        for name in where["qkv"]:
            own = _linear(block, name)
            block.set_submodule(name, nn.Linear(own.in_features, width, bias=own.bias is not None))
        if "fused" in where:
            _with_fewer_inputs(block, where["fused"], before - width)
            continue
        parent, _, name = where["out"].rpartition(".")
        # A stream that the block drops has no output.
        if getattr(block.get_submodule(parent), name, None) is not None:
            block.set_submodule(where["out"], nn.Linear(width, _linear(block, where["out"]).out_features))
    set_heads(attention, heads)


def _with_fewer_inputs(block: nn.Module, path: str, fewer: int) -> None:
    own = _linear(block, path)
    block.set_submodule(path, nn.Linear(own.in_features - fewer, own.out_features, bias=own.bias is not None))


def set_heads(attention: Any, heads: int) -> None:
    """Tell an attention of diffusers how many heads its maps have."""
    width = attention.to_q.out_features
    attention.heads = heads
    for name, value in {"inner_dim": width, "inner_kv_dim": width, "sliceable_head_dim": heads}.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def _linear(module: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, module.get_submodule(path))


def _shape(transformer: Any, pruned: Mapping[str, Any]) -> None:
    """Give all blocks of a new stock transformer the shapes that a configuration describes."""
    basis = None
    if rank := pruned.get("modulation_rank"):
        basis = transformer.modulation_basis = ModulationBasis(pruned["width"], rank)
    for name, entries in pruned["lists"].items():
        for block, entry in zip(getattr(transformer, name), entries, strict=True):
            _shaped(block, entry, pruned, pruned["parts"].get(name, {}), basis)


_classes: dict[str, type] = {}


def pruned_class(stock_name: str) -> type:
    """The class of pruned transformers of one stock class of diffusers, such as `QwenImageTransformer2DModel`."""
    if stock_name in _classes:
        return _classes[stock_name]
    stock = getattr(diffusers, stock_name)

    def __init__(self: Any, pruned: Mapping[str, Any], **config: Any) -> None:
        stock.__init__(self, **config)
        self.register_to_config(pruned=pruned)
        _shape(self, pruned)

    signature = inspect.signature(stock.__init__)
    own = inspect.Parameter("pruned", inspect.Parameter.KEYWORD_ONLY)
    parameters = [*(p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD), own]
    # diffusers reads from it which keys of config.json the class takes.
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    made = type(
        _PREFIX + stock_name, (stock,), {"__init__": __init__, "__module__": __name__, "__doc__": pruned_class.__doc__}
    )
    return _classes.setdefault(stock_name, made)


def __getattr__(name: str) -> type:
    """`PrunedQwenImageTransformer2DModel` and the like, by which `model_index.json` names them."""
    if name.startswith(_PREFIX) and hasattr(diffusers, name.removeprefix(_PREFIX)):
        return pruned_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
