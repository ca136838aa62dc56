"""Parameters of other libraries: their names, as data, and their layouts."""
