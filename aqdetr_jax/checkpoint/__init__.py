"""The only door to Orbax: training checkpoints, and models as folders."""
