"""One input and target as a problem that methods resolve: prompts, conditions, edits."""

from lenslrp.analysis.passes.conditions import through
from lenslrp.analysis.passes.intervene import Edit, edit_units
from lenslrp.analysis.passes.prompts import as_prompt

__all__ = ["Edit", "as_prompt", "edit_units", "through"]
