"""Predict FLOPs, memory and time of a training run on a cluster."""
