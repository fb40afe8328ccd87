"""Defaults of `ppcl plan`; a job's memory check and the tables of `cluster/README.md` take them from here, too.

Without torch: the command line reads them when it starts.
"""

# Blocks that one student replaces, before detection knows.
INTERVAL = 4
# Samples of a step, over all replicas.
BATCH = 16
GPUS = (1, 2, 4, 8, 16, 32, 64)
# Prompts of a job whose prompt file is not known.
PROMPTS = 1000
