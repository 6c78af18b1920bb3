"""The page about a synthesis."""
