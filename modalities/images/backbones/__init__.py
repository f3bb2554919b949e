"""Frozen image backbones: timm vision transformers, SAM 2's Hiera, open_clip towers, LowFormer and EfficientMod."""

from modalities.images.backbones.efficientmod import EfficientMod as EfficientMod
from modalities.images.backbones.lowformer import LowFormer as LowFormer
from modalities.images.backbones.open_clip_tower import OpenClipTower as OpenClipTower
from modalities.images.backbones.timm_hiera import TimmHiera as TimmHiera
from modalities.images.backbones.timm_vit import TimmViT as TimmViT
