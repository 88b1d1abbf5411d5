"""One input and target as a problem that methods resolve: prompts, conditions, edits."""

from lenslrp.analysis.passes.conditions import through
from lenslrp.analysis.passes.prompts import as_prompt
from lenslrp.edits import Edit, edit_units

__all__ = ["Edit", "as_prompt", "edit_units", "through"]
