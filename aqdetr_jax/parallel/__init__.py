"""Mesh, placement and processes."""
