"""Evaluation sets: their layouts, suites, prompts, and images as the evaluations see them."""
