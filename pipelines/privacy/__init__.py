"""Commands about the persons of a raw log: what is too old is deleted, ids are masked for those who ask for a row."""
