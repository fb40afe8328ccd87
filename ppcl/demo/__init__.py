"""The demo teacher: a procedural world of shapes, its checker, and the training of a small Qwen-Image on it."""
