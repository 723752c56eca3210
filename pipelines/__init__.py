"""The pipeline's stages and their order: prepare, encoder, materialize, the ranker arms, compare."""
