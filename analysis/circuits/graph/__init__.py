"""The attribution graph of one prompt."""
