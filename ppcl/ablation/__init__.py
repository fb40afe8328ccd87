"""The ablation: ways to choose the blocks to remove, and ways to train the modules that replace them."""
