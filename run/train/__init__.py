"""Training under DeepSpeed: engine, checkpoints, resuming, optimizer, log."""
