"""The page about a training."""
