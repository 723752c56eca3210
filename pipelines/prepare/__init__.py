"""The first stage: convert the user's own log, Complete Journey or a synthetic log to the tables' contract."""
