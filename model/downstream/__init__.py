"""The trained vision tower under other tasks: a backbone, and decoders for text."""
