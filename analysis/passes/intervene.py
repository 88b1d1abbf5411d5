"""Units switched off, scaled or set: :mod:`lenslrp.edits`, under the name that it has here."""

from lenslrp.edits import Edit, edit_units

__all__ = ["Edit", "edit_units"]
