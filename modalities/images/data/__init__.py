"""Images and camera RAW with a class or a mask each, from folders or a table, or generated; how a file is read."""

from modalities.images.data.classified import ClassifiedImages as ClassifiedImages
from modalities.images.data.files import SUFFIXES as SUFFIXES
from modalities.images.data.files import read_image as read_image
from modalities.images.data.folder_masks import FolderMasks as FolderMasks
from modalities.images.data.folders import ImageFolders as ImageFolders
from modalities.images.data.generated import SHAPES as SHAPES
from modalities.images.data.generated import GeneratedImages as GeneratedImages
from modalities.images.data.generated_shadows import GeneratedShadows as GeneratedShadows
from modalities.images.data.masked import MaskedImages as MaskedImages
from modalities.images.data.prepared import PreparedImages as PreparedImages
from modalities.images.data.raw import Sensor as Sensor
from modalities.images.data.raw_images import GeneratedMosaics as GeneratedMosaics
from modalities.images.data.raw_images import RawFolders as RawFolders
from modalities.images.data.samples import Augmentation as Augmentation
from modalities.images.data.samples import Preparation as Preparation
from modalities.images.data.samples import Prepared as Prepared
