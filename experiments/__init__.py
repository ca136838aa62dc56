"""Drivers that reproduce one table or figure each."""
