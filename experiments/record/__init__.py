"""What writes the fixtures of the tests."""
