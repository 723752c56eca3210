"""The papers' tables, each a comparison of some arms beside what the paper found."""
