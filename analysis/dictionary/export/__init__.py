"""Dictionaries in other layouts."""
