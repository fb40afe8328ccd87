"""How many samples are measured on, of validation and of test; `ppcl.training.data.spread_samples` says which."""

# Samples for the sensitivity of each replacement, and to compare candidate plans.
SEARCH_SAMPLES = 192
# Samples for the velocity errors that are reported of each variant.
REPORT_SAMPLES = 1024
