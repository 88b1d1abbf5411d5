"""Slow, explicit re-implementations that the engine is compared with; none uses autograd."""
