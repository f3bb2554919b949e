"""Frozen image backbones: timm vision transformers and ResNets, open_clip image towers, LowFormer, EfficientMod."""

from modalities.images.backbones.efficientmod import EfficientMod as EfficientMod
from modalities.images.backbones.lowformer import LowFormer as LowFormer
from modalities.images.backbones.open_clip_tower import OpenClipTower as OpenClipTower
from modalities.images.backbones.timm_resnet import TimmResNet as TimmResNet
from modalities.images.backbones.timm_vit import TimmViT as TimmViT
