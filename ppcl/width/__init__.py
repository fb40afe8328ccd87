"""Width pruning: text streams and FFNs replaced by linear maps (PPCL, arXiv 2511.16156, Stage 2, Eq. 7 to 9)."""

from ppcl.width.ffn import FfnMaps, other_ffn
from ppcl.width.folding import Basis
from ppcl.width.narrow import NarrowFfn, eliminate
from ppcl.width.text import RunBlock, RunStart, TextProjectors, text_run

__all__ = ["Basis", "FfnMaps", "NarrowFfn", "RunBlock", "RunStart", "TextProjectors", "eliminate", "other_ffn", "text_run"]
