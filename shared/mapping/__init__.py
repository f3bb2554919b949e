"""Maps: a model's prediction for rasters of any size, written as georeferenced rasters or polygons."""

from shared.mapping.feed import Feed as Feed
from shared.mapping.files import map_files as map_files
from shared.mapping.polygons import outlines as outlines
from shared.mapping.raster import Mapped as Mapped
from shared.mapping.raster import map_raster as map_raster
