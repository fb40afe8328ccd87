"""Choosing plans: Pareto fronts over parameters and latency, and the named variants."""
