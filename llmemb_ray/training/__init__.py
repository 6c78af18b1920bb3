"""Contrastive fine-tuning of the embedder."""
