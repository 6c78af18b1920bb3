"""Hard negatives for contrastive fine-tuning, mined by exact search."""
