"""Units (neurons, heads, channels, directions, features), and what they mean in words."""

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.cross_layer import CrossLayerCoder
from lenslrp.analysis.units.kinds import Direction, Feature, Head, Neuron, Unit
from lenslrp.analysis.units.lens import Lens
from lenslrp.analysis.units.lens_fit import compare_lenses, fit_relevance_lens, fit_ridge_lens
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.analysis.units.projection import (
    VocabularyScores,
    cosines,
    neuron_writes,
    reads,
    sign_cases,
    writes,
)
from lenslrp.analysis.units.readability import TokenRelations
from lenslrp.analysis.units.recurrent import Channel, RecurrentHead

__all__ = [
    "Channel",
    "CrossLayerCoder",
    "Direction",
    "Feature",
    "Head",
    "Lens",
    "Neuron",
    "RecurrentHead",
    "SparseCoder",
    "TokenRelations",
    "Unit",
    "VocabularyScores",
    "compare_lenses",
    "cosines",
    "fit_relevance_lens",
    "fit_ridge_lens",
    "neuron_writes",
    "parse_unit",
    "reads",
    "sign_cases",
    "writes",
]
