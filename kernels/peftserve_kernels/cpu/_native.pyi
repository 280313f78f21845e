"""kernels/native/module.cpp. Addresses come from `Tensor.data_ptr`, 0 for none; arguments are named in ops.h."""

from collections.abc import Iterable

class Tape:
    def start(self, sampled: bool) -> None: ...
    def stop(self) -> None: ...
    def replay(self, tokens: int, sequences: int, sampled: int) -> bool: ...
    def __len__(self) -> int: ...

def supported_isas() -> list[str]: ...
def set_isa(isa: str, /) -> bool: ...
def nf4_linear(
    x: int,
    y: int,
    packed: int,
    absmax: int,
    bias: int,
    dtype: int,
    rows: int,
    columns: int,
    outputs: int,
    int8_inputs: bool,
    threads: int,
    /,
) -> None: ...
def has_int8_inputs() -> bool: ...
def linear_logits(
    x: int,
    weight: int,
    y: int,
    x_dtype: int,
    weight_dtype: int,
    rows: int,
    columns: int,
    outputs: int,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    x: int, weight: int, y: int, dtype: int, out_dtype: int, rows: int, columns: int, eps: float, threads: int, /
) -> None: ...
def residual_add(residual: int, hidden: int, y: int, dtype: int, rows: int, columns: int, threads: int, /) -> None: ...
def silu_mul(gate_up: int, y: int, dtype: int, rows: int, columns: int, threads: int, /) -> None: ...
def embedding(
    ids: int,
    table: int,
    y: int,
    wide_ids: bool,
    dtype: int,
    rows: int,
    entries: int,
    columns: int,
    threads: int,
    /,
) -> bool: ...
def rope_and_store_kv(
    qkv: int,
    cos_sin: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    q: int,
    q_norm: int,
    k_norm: int,
    dtype: int,
    cache_dtype: int,
    rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def paged_attention(
    q: int,
    out: int,
    k_cache: int,
    v_cache: int,
    block_tables: int,
    query_start: int,
    context_len: int,
    dtype: int,
    cache_dtype: int,
    tokens: int,
    sequences: int,
    max_blocks: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int,
    scale: float,
    threads: int,
    /,
) -> None: ...
def lora_add(
    y: int,
    x: int,
    start: int,
    slot: int,
    arena: int,
    rank: int,
    scale: int,
    row_scale: int,
    a_page: int,
    b_page: int,
    slices: Iterable[tuple[int, int, int, int]],
    dtype: int,
    arena_dtype: int,
    tokens: int,
    columns: int,
    y_stride: int,
    segments: int,
    layer: int,
    layers: int,
    targets: int,
    pages: int,
    threads: int,
    /,
) -> None: ...
def bottleneck_add(
    stream: int,
    hidden: int,
    residual: int,
    start: int,
    slot: int,
    arena: int,
    width: int,
    scale: int,
    down_page: int,
    up_page: int,
    down_bias: int,
    up_bias: int,
    activation: int,
    input_mode: int,
    dtype: int,
    arena_dtype: int,
    tokens: int,
    columns: int,
    segments: int,
    layer: int,
    site: int,
    layers: int,
    pages: int,
    threads: int,
    /,
) -> None: ...
def sample(
    logits: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    uniform: int,
    ids: int,
    rows: int,
    vocab: int,
    threads: int,
    /,
) -> None: ...
