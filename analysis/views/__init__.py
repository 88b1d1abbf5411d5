"""Figures, images and the report."""

from lenslrp.analysis.views.circuitsvis import attention_relevance
from lenslrp.analysis.views.drawing import DARK, LIGHT, Theme
from lenslrp.analysis.views.report import write_report

__all__ = ["DARK", "LIGHT", "Theme", "attention_relevance", "write_report"]
