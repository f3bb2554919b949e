"""Texts with a class each, from files or generated; running text and instructions for language modelling."""

from modalities.language.data.corpus import GeneratedCorpus as GeneratedCorpus
from modalities.language.data.corpus import TextCorpus as TextCorpus
from modalities.language.data.files import TextFiles as TextFiles
from modalities.language.data.generated import GeneratedText as GeneratedText
from modalities.language.data.instructions import Instructions as Instructions
from modalities.language.data.texts import Sample as Sample
from modalities.language.data.texts import Texts as Texts
