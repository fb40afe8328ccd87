"""Detection: linear probes, CKA and the contiguous redundant intervals (PPCL, arXiv 2511.16156, Stage 1.1 and 1.2)."""
