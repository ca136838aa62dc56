"""The embedded detection set: generated scenes, nothing to download."""
