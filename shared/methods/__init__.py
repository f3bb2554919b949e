"""One file per published general method."""

from shared.methods.full import Full as Full
from shared.methods.lora import LoRA as LoRA
from shared.methods.probe import Probe as Probe
