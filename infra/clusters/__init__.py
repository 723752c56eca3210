"""Clusters: one file each with the settings of its jobs, and the schedulers that apply it."""
