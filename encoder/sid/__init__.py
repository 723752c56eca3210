"""The Semantic ID: its digits, their packing into int64 ids, and the metadata of its columns.

This is the contract between the encoder, which writes SID columns, and the ranker, which reads
them; it imports no other module of the encoder. A SID is a row of n digits, each in [0, radix),
depth-major (all groups of the coarsest depth first), so that a prefix is a coarser code. Ids are
summed in int64 from integer digits, never from floats, which are exact only up to 24 bits.

`packing` packs digits into ids, `lookup` unpacks ids into digits, `spec` describes a set of SIDs, `columns` names
the Parquet columns and writes the spec into their metadata.
"""
