"""The first stage: a log of one's own, Complete Journey or a synthetic one, into the tables' contract."""
