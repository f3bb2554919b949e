"""Labelled scenes for segmentation and pairs for change detection, from folders or generated; and their rasters."""

from modalities.remote_sensing.data.biome import LandsatBiome as LandsatBiome
from modalities.remote_sensing.data.clouds import BinaryClouds as BinaryClouds
from modalities.remote_sensing.data.clouds import Cloud38 as Cloud38
from modalities.remote_sensing.data.clouds import CloudSEN12 as CloudSEN12
from modalities.remote_sensing.data.clouds import LandsatClouds as LandsatClouds
from modalities.remote_sensing.data.domains import FolderDomains as FolderDomains
from modalities.remote_sensing.data.domains import GeneratedDomains as GeneratedDomains
from modalities.remote_sensing.data.folders import FolderScenes as FolderScenes
from modalities.remote_sensing.data.generated import GeneratedScenes as GeneratedScenes
from modalities.remote_sensing.data.generated_pairs import GeneratedPairs as GeneratedPairs
from modalities.remote_sensing.data.pairs import FolderPairs as FolderPairs
from modalities.remote_sensing.data.scenes import Scenes as Scenes
from modalities.remote_sensing.data.tiling import tiles as tiles
from modalities.remote_sensing.data.torchgeo import TorchGeo as TorchGeo
