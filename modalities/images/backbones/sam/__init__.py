"""Segment Anything, whole or its image encoder alone."""

from modalities.images.backbones.sam.models import SAM as SAM
from modalities.images.backbones.sam.models import SAMEncoder as SAMEncoder
from modalities.images.backbones.sam.prompts import Masks as Masks
from modalities.images.backbones.sam.prompts import Prompts as Prompts
