"""The page about one or several evaluations."""
