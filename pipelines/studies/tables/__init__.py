"""The papers' tables: each compares some arms and shows the paper's figures next to ours."""
