"""ppcl: compress multi-modal diffusion transformers into families of pluggable variants."""

__version__ = "0.2.0"
