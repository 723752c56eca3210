"""What the comparison looks like: the schema of its numbers, the tables, the figures and the HTML page."""
