"""Compression methods, one file per method; METHODS is the only registry."""

from __future__ import annotations

from laconic.methods.autoround import AutoRound
from laconic.methods.awq import Awq
from laconic.methods.depth import Depth
from laconic.methods.gptq import Gptq
from laconic.methods.kivi import Kivi
from laconic.methods.kv_fp8 import KvFp8
from laconic.methods.kv_int8 import KvInt8
from laconic.methods.kv_per_token import KvPerToken
from laconic.methods.kvquant import KvQuant
from laconic.methods.llm_int8 import LlmInt8
from laconic.methods.llm_pruner.stage import LlmPruner
from laconic.methods.lora.lora import Lora
from laconic.methods.lora.qlora import QLora
from laconic.methods.magnitude import Magnitude
from laconic.methods.reap import Reap
from laconic.methods.registry_check import check_methods
from laconic.methods.rotate import Rotate
from laconic.methods.rtn import Rtn
from laconic.methods.smoothquant import SmoothQuant
from laconic.methods.sparsegpt import SparseGpt
from laconic.methods.wanda import Wanda
from laconic.methods.zeroquant import ZeroQuant

METHODS = (
    Rtn,
    Gptq,
    Awq,
    AutoRound,
    ZeroQuant,
    LlmInt8,
    SmoothQuant,
    Rotate,
    Magnitude,
    Wanda,
    SparseGpt,
    LlmPruner,
    Depth,
    Reap,
    Lora,
    QLora,
    Kivi,
    KvQuant,
    KvPerToken,
    KvInt8,
    KvFp8,
)

check_methods(METHODS)
