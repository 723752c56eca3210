"""The user's own log in the tables' contract: a folder of joined impressions, items and users (`kind: tables`)."""
