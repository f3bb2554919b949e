"""Texts with a class each, from files or generated, of one task or several; running text, and instructions."""

from modalities.language.data.corpus import GeneratedCorpus as GeneratedCorpus
from modalities.language.data.corpus import TextCorpus as TextCorpus
from modalities.language.data.files import TextFiles as TextFiles
from modalities.language.data.generated import GeneratedForms as GeneratedForms
from modalities.language.data.generated import GeneratedText as GeneratedText
from modalities.language.data.instructions import Instructions as Instructions
from modalities.language.data.several import SeveralTasks as SeveralTasks
from modalities.language.data.texts import Sample as Sample
from modalities.language.data.texts import Texts as Texts
