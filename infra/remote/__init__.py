"""Object stores: paths that are URLs, and what of them lies on this machine (docs/clusters.md)."""
