"""Drawings: attention as heat maps, outlines and tables."""
