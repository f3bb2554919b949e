"""Images and animated clips with captions, from folders or generated, to train diffusion models on."""

from modalities.diffusion.data.clips import AnimatedStickers as AnimatedStickers
from modalities.diffusion.data.clips import MovingDots as MovingDots
from modalities.diffusion.data.images import CaptionedImages as CaptionedImages
from modalities.diffusion.data.images import GeneratedShapes as GeneratedShapes
from modalities.diffusion.data.videos import CaptionedClips as CaptionedClips
from modalities.diffusion.data.videos import MovingShapes as MovingShapes
