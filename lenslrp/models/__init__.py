"""Loading a model, checking that it is the one that was asked for, and what it needs."""
