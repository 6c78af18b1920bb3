"""Search over the shards of a run."""
