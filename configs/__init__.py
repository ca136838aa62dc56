"""Experiment configurations; each file's docstring says its command, its result and its cost."""
