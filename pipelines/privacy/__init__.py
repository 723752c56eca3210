"""Privacy commands for a raw log: delete expired rows, and mask ids to look up a row."""
