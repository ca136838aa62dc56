"""Object stores; :mod:`aqdetr_jax.io` is the way in."""
