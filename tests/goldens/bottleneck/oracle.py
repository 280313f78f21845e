"""The oracle behind the goldens: AdapterHub in float32 on NF4-dequantised weights, without a KV cache.

Runs in the venv described in ``make_goldens.py`` (adapters 1.3.0, transformers 4.57, bitsandbytes 0.50.2).
"""

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found,unused-ignore]
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 12
TOP_K = 5

# AdapterHub warns at each load that the adapter is not active yet.
logging.getLogger("adapters").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Case:
    """One prompt, continued greedily for ``STEPS`` tokens.

    Attributes:
        prompt: token ids.
        tokens: the greedy continuation, [STEPS].
        top_ids: the TOP_K most likely ids at each step, likeliest first, [STEPS][TOP_K]; the first is the token.
        top_logprobs: their natural log-probabilities, [STEPS][TOP_K].
    """

    prompt: list[int]
    tokens: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @property
    def margin(self) -> float:
        """The smallest lead of the greedy token over the runner-up, in nats."""
        return min(row[0] - row[1] for row in self.top_logprobs)

    def as_json(self) -> dict[str, Any]:
        """The attributes, as they are written to the JSON files."""
        return asdict(self)


def nf4_round_trip(weight: Tensor) -> tuple[Tensor, bytes]:
    """Quantises ``weight`` [out, in] to NF4 with double-quantised absmax.

    Returns:
        The float32 values ``code[nibble] * absmax`` [out, in]; and the packed nibbles, then the absmax bytes.
    """
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    stored = packed.numpy().tobytes() + state.absmax.numpy().tobytes()
    # dequantize_4bit rounds to the dtype that was quantised; the served kernels do not.
    state.dtype = torch.float32
    return dequantize_4bit(packed, state), stored


def nf4_base(model: Any) -> str:
    """Makes a ``LlamaForCausalLM``, loaded in float32, the served base, in place, and adds adapter support.

    Returns:
        Hex sha256 over each quantised weight in the order of the names: name, packed nibbles, absmax bytes.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight.bfloat16())
        linears = {name: module for name, module in model.named_modules() if name.endswith(QUANTIZED)}
        for name in sorted(linears):
            linear = linears[name]
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name} is a {type(linear).__name__}, not nn.Linear")
            values, stored = nf4_round_trip(linear.weight)
            linear.weight.copy_(values)
            digest.update(name.encode())
            digest.update(stored)
    adapters.init(model)
    model.eval()
    return digest.hexdigest()


def activate(model: Any, folder: Path) -> None:
    """Loads the adapter in ``folder`` and makes it the only active one.

    Raises:
        ValueError: AdapterHub found tensors missing or left over, which it would only log.
    """
    info: dict[str, list[str]] = {}
    name = model.load_adapter(str(folder), use_safetensors=True, with_head=False, loading_info=info)
    if faults := info["missing_keys"] + info["unexpected_keys"]:
        raise ValueError(f"{folder}: missing or unexpected tensors {faults}")
    model.set_active_adapters(name)
    model.eval()


def deactivate(model: Any) -> None:
    """Back to the bare base, with no adapter loaded."""
    model.set_active_adapters(None)
    for name in list(model.adapters_config):
        model.delete_adapter(name)


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> Case:
    """Continues ``prompt`` with ``STEPS`` greedy tokens, each from a full pass over all tokens before it."""
    tokens: list[int] = []
    top_ids: list[list[int]] = []
    top_logprobs: list[list[float]] = []
    for _ in range(STEPS):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        top = logits.double().log_softmax(-1).topk(TOP_K)
        top_ids.append(top.indices.tolist())
        top_logprobs.append([round(value, 6) for value in top.values.tolist()])
        tokens.append(top_ids[-1][0])
    return Case(prompt, tokens, top_ids, top_logprobs)
