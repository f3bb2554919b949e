"""Images with captions: of a table of file and caption, or generated."""

from modalities.vision_language.data.captioned import ImagesWithCaptions as ImagesWithCaptions
from modalities.vision_language.data.folder import CaptionedFolder as CaptionedFolder
from modalities.vision_language.data.generated import GeneratedCaptions as GeneratedCaptions
