"""Where results lie: object stores, their mirrors on a node, manifests, leases and tensor files."""
