"""Comparison of the engines with one-by-one transformers inference, before money is spent."""
