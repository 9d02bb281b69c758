"""Weights on disk: our own files, the released checkpoints, and how a folder of either becomes models."""
