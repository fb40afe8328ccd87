"""The method on Ray: calibration (Ray Data), probes and distillation (Ray Train), the coordinator, the command line."""
