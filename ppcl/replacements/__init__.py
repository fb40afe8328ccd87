"""What can be replaced in a teacher: one file a kind, a registry of the kinds, and plans of what is on.

- `Interval`: a run of blocks becomes one student block (depth).
- `TextRun`: in a run of blocks the text stream is replaced by linear projectors (width).
- `LinearFfn`: a block's FFNs become residual linear maps (width).
- `PrunedFfn`: a block's FFNs keep a part of their hidden units (width).
- `PrunedHeads`: a block's attention keeps a part of its heads (width).
- `LowRankModulation`: all modulations are computed in the few directions the timestep moves them in (width, nearly
  without loss).
- `TunedBlock`: a block that stays, trained with one plan, which takes it along; plans do not name it.

Depth is PPCL's Stage 1, width its Stage 2 (arXiv 2511.16156, Eq. 6 to 9); pruned FFNs, pruned heads and low-rank
modulations are not in the paper.
"""

from ppcl.replacements.linear_ffn import LinearFfn
from ppcl.replacements.low_rank_modulation import LowRankModulation
from ppcl.replacements.plan import Plan, checked_plan, conflicts, enclosing
from ppcl.replacements.pruned_ffn import PrunedFfn
from ppcl.replacements.pruned_heads import PrunedHeads
from ppcl.replacements.registry import KINDS, parse_name, parse_replacement, parse_text, sort_key
from ppcl.replacements.replacement import Replacement
from ppcl.replacements.student_block import Interval
from ppcl.replacements.text_projectors import TextRun
from ppcl.replacements.tuned_block import TunedBlock

__all__ = [
    "KINDS",
    "Interval",
    "LinearFfn",
    "LowRankModulation",
    "Plan",
    "PrunedFfn",
    "PrunedHeads",
    "Replacement",
    "TextRun",
    "TunedBlock",
    "checked_plan",
    "conflicts",
    "enclosing",
    "parse_name",
    "parse_replacement",
    "parse_text",
    "sort_key",
]
