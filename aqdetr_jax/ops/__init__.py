"""Pure array functions: boxes, positional encodings, attention, sampling, linear assignment."""
