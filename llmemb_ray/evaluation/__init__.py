"""Evaluation: what a model's vectors are worth on the papers' tasks."""
