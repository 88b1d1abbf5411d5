"""What every unit of a model does, over a corpus."""

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.export.folders import export_html, export_neuronpedia
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.launch import build_distributed, build_with_ray, explain_with_ray
from lenslrp.analysis.dictionary.naming.names import name_unit
from lenslrp.analysis.dictionary.naming.providers import LanguageModel, TokenRule
from lenslrp.analysis.dictionary.pages.page import page_html, write_page
from lenslrp.analysis.dictionary.scan import scan_shard
from lenslrp.analysis.dictionary.unit import Page

__all__ = [
    "LanguageModel",
    "NeuronDictionary",
    "Page",
    "TokenRule",
    "build_distributed",
    "build_with_ray",
    "explain_with_ray",
    "export_html",
    "export_neuronpedia",
    "name_unit",
    "page_html",
    "prepare",
    "scan_shard",
    "write_page",
]
