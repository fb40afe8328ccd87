"""Width pruning: text streams and FFNs replaced by linear maps (PPCL, arXiv 2511.16156, Stage 2, Eq. 7 to 9)."""

from ppcl.replacements.linear_ffn import FfnMaps, other_ffn
from ppcl.replacements.low_rank_modulation import Basis
from ppcl.replacements.pruned_ffn import NarrowFfn, eliminate
from ppcl.replacements.text_projectors import RunBlock, RunStart, TextProjectors, text_run

__all__ = ["Basis", "FfnMaps", "NarrowFfn", "RunBlock", "RunStart", "TextProjectors", "eliminate", "other_ffn", "text_run"]
