"""AttnLRP and the methods it is compared with, behind one interface."""

from lenslrp.analysis.attribution.methods import METHODS, Attribution, Method, attribute

__all__ = ["METHODS", "Attribution", "Method", "attribute"]
