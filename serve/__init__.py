"""Pruned models on Ray Serve: the engine, the API that clients already speak, autoscaling, the playground page."""
