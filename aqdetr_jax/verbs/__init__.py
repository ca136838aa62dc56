"""What the verbs of the command do: they call the package, and print what it says; no logic.

A verb imports what it needs when it runs: help and mistyped arguments must not wait for JAX.

Each takes the parsed arguments and the overrides of the configuration, and returns an exit status
(None = 0).
"""
