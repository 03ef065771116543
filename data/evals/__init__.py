"""Evaluation sets: layouts, suites, prompts, and loaders of their images."""
