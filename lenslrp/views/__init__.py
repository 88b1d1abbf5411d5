"""Tokens as HTML and in the terminal."""
