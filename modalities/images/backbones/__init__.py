"""Frozen image backbones: timm vision transformers, open_clip image towers, LowFormer, EfficientMod and black boxes."""

from modalities.images.backbones.black_box import BlackBox as BlackBox
from modalities.images.backbones.efficientmod import EfficientMod as EfficientMod
from modalities.images.backbones.lowformer import LowFormer as LowFormer
from modalities.images.backbones.open_clip_tower import OpenClipTower as OpenClipTower
from modalities.images.backbones.timm_vit import TimmViT as TimmViT
