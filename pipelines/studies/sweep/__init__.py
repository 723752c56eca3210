"""The sweep of the encoder's three parameters: levels, depth and groups at a budget of bits (SIDE paper, 6.1.2)."""
