"""Verify conversions against the reference libraries, and describe the model at a path."""
