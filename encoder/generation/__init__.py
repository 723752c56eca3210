"""The columns of a generation of SIDs: partitions beside the items (users), the events and the requests.

`sets` assigns encoders to sets of SIDs, `parts` encodes the items' parts, `dates` looks up the SIDs of events and
requests, `aligned` writes columns that are row-aligned with a file.
"""
