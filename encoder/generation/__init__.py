"""The columns of a generation of SIDs: partitions beside the items (users), the events and the requests.

`sets` says which encoder makes which set, `parts` encodes the items' parts, `dates` looks up the SIDs of events and
requests, `aligned` writes columns beside the rows of a file.
"""
