"""Teachers and teacher sources of a run, and the cache of teacher logits."""
