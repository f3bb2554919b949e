"""One file per published general method."""

from shared.methods.adapt_former import AdaptFormer as AdaptFormer
from shared.methods.bert_bottleneck import BertBottleneck as BertBottleneck
from shared.methods.bitfit import BitFit as BitFit
from shared.methods.full import Full as Full
from shared.methods.ia3 import IA3 as IA3
from shared.methods.imported import Imported as Imported
from shared.methods.llm_adapters import ParallelAdapter as ParallelAdapter
from shared.methods.llm_adapters import SeriesAdapter as SeriesAdapter
from shared.methods.lora import LoRA as LoRA
from shared.methods.norm_tuning import NormTuning as NormTuning
from shared.methods.prefix import Prefix as Prefix
from shared.methods.probe import Probe as Probe
from shared.methods.prompts import Prompt as Prompt
from shared.methods.ssf import SSF as SSF
