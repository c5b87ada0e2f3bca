"""Weights on disk: which files make a model, and how they come into memory whole or not at all."""
