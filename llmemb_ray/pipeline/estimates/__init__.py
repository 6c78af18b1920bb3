"""What a run is expected to be, before it is one: tokens, sizes, operations, hours and cost, from a sample of the corpus."""
