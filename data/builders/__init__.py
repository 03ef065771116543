"""Build and check data: tar shards, evaluation sets and tokenizers out of what a user has."""
