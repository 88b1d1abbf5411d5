"""Names for units by a provider, scored on examples it has not seen."""
