"""AttnLRP and the methods it is compared with, behind one interface; pairs of tokens; hops."""

from lenslrp.analysis.attribution.features import FeatureRelevance, feature_relevance
from lenslrp.analysis.attribution.hops import Hop, Hops, explain_hops
from lenslrp.analysis.attribution.methods import METHODS, Attribution, Method, attribute
from lenslrp.analysis.attribution.pairs_of_tokens import TokenPairs, bilrp

__all__ = [
    "METHODS",
    "Attribution",
    "FeatureRelevance",
    "Hop",
    "Hops",
    "Method",
    "TokenPairs",
    "attribute",
    "bilrp",
    "explain_hops",
    "feature_relevance",
]
