"""Text from instruction-following LLMs: through an OpenAI-compatible endpoint, or from a model loaded here or on the cluster."""
