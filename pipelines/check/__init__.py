"""A look at a raw log before anything is trained: what it holds, what is wrong with it, what a run will take."""
