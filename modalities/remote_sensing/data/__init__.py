"""Labelled scenes for segmentation: read from folders, from Landsat-8 Biome, or generated."""

from modalities.remote_sensing.data.biome import LandsatBiome as LandsatBiome
from modalities.remote_sensing.data.folders import FolderScenes as FolderScenes
from modalities.remote_sensing.data.generated import GeneratedScenes as GeneratedScenes
from modalities.remote_sensing.data.scenes import Scenes as Scenes
