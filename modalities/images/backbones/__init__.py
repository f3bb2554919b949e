"""Frozen image backbones: timm's, open_clip towers, LowFormer, EfficientMod, MiT, Segment Anything, black boxes."""

from modalities.images.backbones.black_box import BlackBox as BlackBox
from modalities.images.backbones.efficientmod import EfficientMod as EfficientMod
from modalities.images.backbones.inputs import library as library
from modalities.images.backbones.inputs import nearest as nearest
from modalities.images.backbones.lowformer import LowFormer as LowFormer
from modalities.images.backbones.mit import MiT as MiT
from modalities.images.backbones.open_clip_tower import OpenClipTower as OpenClipTower
from modalities.images.backbones.sam import SAM as SAM
from modalities.images.backbones.sam import Masks as Masks
from modalities.images.backbones.sam import Prompts as Prompts
from modalities.images.backbones.sam import SAMEncoder as SAMEncoder
from modalities.images.backbones.sites import resblock_sites as resblock_sites
from modalities.images.backbones.timm_hiera import TimmHiera as TimmHiera
from modalities.images.backbones.timm_resnet import TimmResNet as TimmResNet
from modalities.images.backbones.timm_vit import TimmViT as TimmViT
