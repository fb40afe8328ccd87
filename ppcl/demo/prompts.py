"""The demo's calibration prompts: the captions the teacher was trained on, and others made of the same words.

    python -m ppcl.demo.prompts > demo/prompts.txt

Distillation needs no pictures, so it is not bound to the captions there are pictures of; and on few captions the replacements
learn those by heart. None of the prompts is a caption that is held out.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ppcl.demo.world import COUNTS, PALETTE, RELATIONS, SHAPES, captions

OTHERS = 1500


def others() -> list[str]:
    """What the captions' words can say besides: two coloured shapes in a relation, of one shape or colour too, shapes without
    a colour."""
    made = set()
    for s, t in product(SHAPES, SHAPES):
        made |= {f"a photo of a {s} {r} a {t}" for r in RELATIONS} | {f"a photo of a {s} and a {t}"}
        made |= {f"a photo of a {s} and a {c} {t}" for c in PALETTE}
        for c, d in product(PALETTE, PALETTE):
            made |= {f"a photo of a {c} {s} {between} a {d} {t}" for between in (*RELATIONS, "and")}
    made |= {f"a photo of {count} {s}{'es' if s == 'cross' else 's'}" for count in COUNTS for s in SHAPES}
    return sorted(made - {caption.text for caption in captions()})


def prompts(seed: int = 0) -> list[str]:
    """The trained captions, then `OTHERS` of the other prompts, drawn at random."""
    drawn = np.random.default_rng(seed).permutation(others())[:OTHERS]
    return [*(caption.text for caption in captions() if not caption.held_out), *map(str, drawn)]


if __name__ == "__main__":
    print("\n".join(prompts()))
