"""Rasters as files: read by window with what is valid and where it lies, bands and dates together; masks; writing."""

from shared.rasters.band_files import Stack as Stack
from shared.rasters.band_files import gather as gather
from shared.rasters.band_files import open_stack as open_stack
from shared.rasters.band_files import read_stack_header as read_stack_header
from shared.rasters.gdal import quiet as quiet
from shared.rasters.masks import IGNORE as IGNORE
from shared.rasters.masks import Labels as Labels
from shared.rasters.masks import read_mask as read_mask
from shared.rasters.pairs import Pair as Pair
from shared.rasters.pairs import check_grid as check_grid
from shared.rasters.pairs import of_two_dates as of_two_dates
from shared.rasters.pairs import open_pair as open_pair
from shared.rasters.reading import Georeference as Georeference
from shared.rasters.reading import Header as Header
from shared.rasters.reading import Image as Image
from shared.rasters.reading import Raster as Raster
from shared.rasters.reading import Window as Window
from shared.rasters.reading import check_name as check_name
from shared.rasters.reading import check_spectral as check_spectral
from shared.rasters.reading import open_image as open_image
from shared.rasters.reading import read_header as read_header
from shared.rasters.reading import read_image as read_image
from shared.rasters.search import rasters_below as rasters_below
from shared.rasters.writing import write_raster as write_raster
