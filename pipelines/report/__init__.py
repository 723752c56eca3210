"""The comparison's report: the schema of its numbers, the tables, the figures and the HTML page."""
