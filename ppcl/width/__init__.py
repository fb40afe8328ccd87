"""Width pruning: text streams and FFNs replaced by linear maps (PPCL, arXiv 2511.16156, Stage 2, Eq. 7 to 9)."""

from ppcl.width.ffn import FfnMaps, without_ffn
from ppcl.width.folding import Basis
from ppcl.width.text import RunBlock, RunStart, TextProjectors, text_run

__all__ = ["Basis", "FfnMaps", "RunBlock", "RunStart", "TextProjectors", "text_run", "without_ffn"]
