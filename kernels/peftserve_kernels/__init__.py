"""The ops of peftserve: public launchers, their torch references, and one dispatch by device.

One file an op. A launcher checks shapes and calls the implementation that `dispatch.select` names for the device; all
implementations of an op share its signature and its meaning. Two rules hold for all of them: sums are float32, whatever
the dtype of the inputs, and are rounded once to the output's dtype; metadata tensors live on the device of the data.
"""

from peftserve_kernels.activation import Activation
from peftserve_kernels.bottleneck import BottleneckInput, BottleneckSite, BottleneckWeights, bottleneck_add
from peftserve_kernels.copy_pages import copy_pages
from peftserve_kernels.dispatch import Backend
from peftserve_kernels.embedding import embedding
from peftserve_kernels.linear import linear_logits
from peftserve_kernels.lora import LoraSlice, LoraWeights, lora_add
from peftserve_kernels.nf4 import NF4_BLOCK, NF4_CODE, Nf4Layout, Nf4Weight, dequantize_nf4
from peftserve_kernels.nf4_linear import nf4_linear, prepare_nf4
from peftserve_kernels.paged_attention import AttentionBatch, paged_attention
from peftserve_kernels.penalties import Penalties, RowPenalties, apply_penalties
from peftserve_kernels.rank_pages import RANK_PAGE_ROWS, rank_pages, read_rank_rows
from peftserve_kernels.residual_add import residual_add
from peftserve_kernels.rms_norm import rms_norm
from peftserve_kernels.rope import rope_and_store_kv
from peftserve_kernels.sample import sample
from peftserve_kernels.segments import Segments
from peftserve_kernels.silu_mul import silu_mul

__all__ = [
    "NF4_BLOCK",
    "NF4_CODE",
    "RANK_PAGE_ROWS",
    "Activation",
    "AttentionBatch",
    "Backend",
    "BottleneckInput",
    "BottleneckSite",
    "BottleneckWeights",
    "LoraSlice",
    "LoraWeights",
    "Nf4Layout",
    "Nf4Weight",
    "Penalties",
    "RowPenalties",
    "Segments",
    "apply_penalties",
    "bottleneck_add",
    "copy_pages",
    "dequantize_nf4",
    "embedding",
    "linear_logits",
    "lora_add",
    "nf4_linear",
    "paged_attention",
    "prepare_nf4",
    "rank_pages",
    "read_rank_rows",
    "residual_add",
    "rms_norm",
    "rope_and_store_kv",
    "sample",
    "silu_mul",
]
