"""What runs when: prepare, encoder, materialize, the ranker arms, compare; launched as one pipeline."""
