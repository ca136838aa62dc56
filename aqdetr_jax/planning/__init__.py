"""What a slice of TPUs gives a configuration, found by compiling its step without a TPU."""
