"""How the blocks of a list take and return the streams, and what else they are called with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class BlockLayout:
    """- `img`, `txt`: arguments of the block's forward that take the streams. `txt` is None where text and image tokens
      come as one stream, in `img`, and the block returns a bare tensor.
    - `returns`: the streams that a block returns, in order.
    - `arguments`: all arguments of the block's forward, in order; by them a positional call is read.
    """

    img: str = "hidden_states"
    txt: str | None = "encoder_hidden_states"
    returns: tuple[str, ...] = ("txt", "img")
    arguments: tuple[str, ...] = ()

    def named(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name: some stock forwards call their blocks by position."""
        return {**dict(zip(self.arguments, arguments, strict=False)), **named}


# Of blocks that take and return text and image tokens as one stream.
ONE_STREAM = BlockLayout(txt=None, returns=("img",))


class Context(dict[str, Any]):
    """The arguments of blocks beside their streams: as a dictionary, those that all blocks are given alike.

    `own`: by block number, those of which a block has its own; empty where all blocks are called alike. `layouts`: by
    block number.
    """

    def __init__(self, by_block: Mapping[int, Mapping[str, Any]], layouts: Mapping[int, BlockLayout]):
        contexts = list(by_block.values())
        first = contexts[0] if contexts else {}
        shared = {
            name: value
            for name, value in first.items()
            if all(name in other and other[name] is value for other in contexts)
        }
        super().__init__(shared)
        self.own = {
            number: {name: value for name, value in context.items() if name not in shared}
            for number, context in by_block.items()
        }
        self.layouts = dict(layouts)

    @property
    def alike(self) -> bool:
        """Whether all blocks are called alike."""
        return not any(self.own.values()) and len(set(self.layouts.values())) == 1

    def of(self, number: int | None) -> tuple[BlockLayout, dict[str, Any]]:
        """The layout of a block, and all its arguments beside the streams. None: any, where all are called alike."""
        if number is None:
            if not self.alike:
                raise ValueError("the blocks of this model are called with different arguments: give a block's number")
            number = next(iter(self.layouts))
        return self.layouts[number], {**self, **self.own[number]}

    def mapped(self, function: Callable[[Any], Any]) -> Context:
        """The same with `function` of every argument."""
        made = Context({}, self.layouts)
        made.update({name: function(value) for name, value in self.items()})
        made.own = {n: {name: function(value) for name, value in own.items()} for n, own in self.own.items()}
        return made


def _unflattened(children: Any, layouts: Any) -> Context:
    made = Context({}, layouts)
    shared, made.own = children
    made.update(shared)
    return made


# What walks through trees of tensors sees those of a context too: torch takes a subclass of a dictionary for a leaf.
register_pytree_node(Context, lambda context: ([dict(context), context.own], context.layouts), _unflattened)


@cache
def class_of_transformer(name: str) -> Any:
    """A transformer's class in diffusers."""
    import diffusers

    return getattr(diffusers, name)


def block_class(transformer: str, name: str) -> type[nn.Module] | None:
    """A block's class, which lies in the file of the transformer's class; None where the file has none of that name."""
    return getattr(sys.modules[class_of_transformer(transformer).__module__], name, None)


def registered_layout(transformer: str, name: str) -> BlockLayout | None:
    """What diffusers' own registry, which its caches rely on, says of a class of blocks; None where it lacks it."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        known: Any = TransformerBlockRegistry.get(block_class(transformer, name))
    except (ImportError, ValueError):
        return None
    img = known.hidden_states_argument_name
    if known.return_encoder_hidden_states_index is None:
        return BlockLayout(img, None, ("img",))
    order = {known.return_hidden_states_index: "img", known.return_encoder_hidden_states_index: "txt"}
    return BlockLayout(img, known.encoder_hidden_states_argument_name, tuple(order[index] for index in sorted(order)))


def resolved(layout: BlockLayout, transformer: str, name: str) -> BlockLayout:
    """A layout with the arguments of the block's forward."""
    own = block_class(transformer, name)
    parameters = list(inspect.signature(own.forward).parameters.values())[1:] if own else []
    return replace(layout, arguments=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD))
