"""Object stores: paths that are URLs, and their copies on this machine (docs/clusters.md)."""
