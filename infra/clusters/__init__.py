"""Clusters: a file each that says how jobs run there, and the schedulers that render jobs by it."""
