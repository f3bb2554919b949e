"""Frozen image backbones: timm vision transformers and open_clip image towers."""

from modalities.images.backbones.open_clip_tower import OpenClipTower as OpenClipTower
from modalities.images.backbones.timm_vit import TimmViT as TimmViT
