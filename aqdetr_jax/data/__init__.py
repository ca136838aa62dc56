"""Detection data: datasets, augmentation and the Grain input pipeline (all TensorFlow-free)."""
