"""Frozen language backbones: transformers of the library of that name."""

from modalities.language.backbones.transformers_text import Hidden as Hidden
from modalities.language.backbones.transformers_text import TransformersText as TransformersText
