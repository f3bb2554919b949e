"""Frozen language backbones: transformers of the library of that name, and the small one of the package."""

from modalities.language.backbones.small_lm import SmallLM as SmallLM
from modalities.language.backbones.transformers_text import Hidden as Hidden
from modalities.language.backbones.transformers_text import TransformersText as TransformersText
