"""What leaves for devices: files that run without this package's training code."""
