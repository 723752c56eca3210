"""A log of one's own in the tables' contract: a folder of joined impressions, items and users (`kind: tables`)."""
