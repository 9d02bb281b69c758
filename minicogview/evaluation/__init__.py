"""Measures of how good a model is, and of what it costs."""
