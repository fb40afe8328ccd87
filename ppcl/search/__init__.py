"""Choosing plans: Pareto fronts over parameters and time, and the named variants."""
