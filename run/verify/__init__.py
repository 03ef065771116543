"""Verify conversions against the other libraries, and describe what is at a path."""
