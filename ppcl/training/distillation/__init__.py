"""Depth distillation, non-sequential and segment-parallel (PPCL, arXiv 2511.16156, Stage 1.3)."""
