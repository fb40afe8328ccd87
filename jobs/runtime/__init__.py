"""Running work on Ray: clusters, resources, worker groups, actor pools, heartbeats."""
