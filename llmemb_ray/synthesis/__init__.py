"""Synthetic training data (paper 2, section 3.1): tasks, queries, positives and hard negatives that an LLM writes."""
