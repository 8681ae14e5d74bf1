"""The teachers of a run, and the answers of theirs that are kept."""
