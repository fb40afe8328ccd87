"""Width pruning: text streams and FFNs replaced by linear maps (PPCL, arXiv 2511.16156, Stage 2, Eq. 7 to 9)."""

from ppcl.replacements.linear_ffn import LinearFfn, with_ffn
from ppcl.replacements.low_rank_modulation import ModulationBasis
from ppcl.replacements.pruned_ffn import PrunedFfn, eliminate_units
from ppcl.replacements.text_projectors import RunBlock, RunStart, TextProjectors, text_run

__all__ = [
    "ModulationBasis",
    "LinearFfn",
    "PrunedFfn",
    "RunBlock",
    "RunStart",
    "TextProjectors",
    "eliminate_units",
    "with_ffn",
    "text_run",
]
