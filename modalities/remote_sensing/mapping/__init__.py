"""Maps: a model's prediction for rasters of any size, written as georeferenced rasters or polygons."""

from modalities.remote_sensing.mapping.feed import Feed as Feed
from modalities.remote_sensing.mapping.files import map_files as map_files
from modalities.remote_sensing.mapping.polygons import outlines as outlines
from modalities.remote_sensing.mapping.raster import Mapped as Mapped
from modalities.remote_sensing.mapping.raster import map_raster as map_raster
