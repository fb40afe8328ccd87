"""The stages of a job, one module each."""
