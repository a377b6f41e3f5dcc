"""Scores of the field: J&F, G and video AP as `evaluate` modules, and the functions under them."""
