"""The columns of a generation of SIDs: partitions row-aligned with items (users), events and requests.

`sets` assigns encoders to sets of SIDs, `parts` encodes the items' parts, `dates` looks up the SIDs of events and
requests, `aligned` writes columns that are row-aligned with a file.
"""
