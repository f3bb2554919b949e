"""Segmentation heads: from a backbone's feature maps to class scores of pixels.

Every head is called with ``(features, size)``, and offers ``loss(output, mask)`` and ``predict(output, size)``. Those
of change detection take the features of two dates.
"""

from modalities.remote_sensing.heads.change import ResidualPyramidDecoder as ResidualPyramidDecoder
from modalities.remote_sensing.heads.change import SSBiFPNDecoder as SSBiFPNDecoder
from modalities.remote_sensing.heads.fpn import SemanticFPN as SemanticFPN
from modalities.remote_sensing.heads.light import LightDecoder as LightDecoder
from modalities.remote_sensing.heads.light import LinearDecoder as LinearDecoder
from modalities.remote_sensing.heads.light import PixelDecoder as PixelDecoder
from modalities.remote_sensing.heads.mask2former import Mask2FormerHead as Mask2FormerHead
