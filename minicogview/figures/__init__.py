"""Figures and widgets that the notebooks share."""
