"""``python -m aqdetr_jax`` is the command ``aqdetr``."""

from aqdetr_jax.cli import entry_point

entry_point()
