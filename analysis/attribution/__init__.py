"""AttnLRP and the methods it is compared with, behind one interface; pairs of tokens."""

from lenslrp.analysis.attribution.features import FeatureRelevance, feature_relevance
from lenslrp.analysis.attribution.methods import METHODS, Attribution, Method, attribute
from lenslrp.analysis.attribution.pairs_of_tokens import TokenPairs, bilrp

__all__ = [
    "METHODS",
    "Attribution",
    "FeatureRelevance",
    "Method",
    "TokenPairs",
    "attribute",
    "bilrp",
    "feature_relevance",
]
