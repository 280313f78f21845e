"""The rival: PEFT on transformers, on the very weights that are served (NF4, dequantised to bf16, or to float32
where torch is faster in that).

PEFT can mix LoRAs and the bare base in one batch (`adapter_names`), but neither prefixes nor bottleneck adapters.
"""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from machine import dense_dtype
from peftserve.model.dense import dense_state

# PEFT imports bitsandbytes, which warns of an optional kernel that nothing here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from peft import PeftModel  # noqa: E402

BASE = "__base__"
"""PEFT's name for the base in `adapter_names`."""


class PeftBaseline:
    """`generate` in `machine.dense_dtype()`, greedy, with LoRAs from `folders` by name."""

    def __init__(self, checkpoint: Path, folders: Mapping[str, Path]) -> None:
        config = AutoConfig.from_pretrained(checkpoint)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        base = AutoModelForCausalLM.from_config(config, dtype=dense_dtype())  # type: ignore[no-untyped-call]
        missing, unexpected = base.load_state_dict(dense_state(checkpoint), strict=False)
        if unexpected or missing not in ([], ["lm_head.weight"]):
            raise RuntimeError(f"the checkpoint does not fit: missing {missing}, unexpected {unexpected}")
        base.tie_weights()
        (first, folder), *others = folders.items()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks transformers by names that it deprecates
            # Adapters stay in the base's dtype: PEFT's default, float32, is slower beside bf16.
            self._model: Any = PeftModel.from_pretrained(base, folder, adapter_name=first, autocast_adapter_dtype=False)
            for name, folder in others:
                self._model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self._model.to(dense_dtype()).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @torch.inference_mode()
    def tokens_per_s(
        self, prompts: Sequence[str], adapters: Sequence[str | None], *, batch_size: int, max_tokens: int
    ) -> float:
        """Output tokens/s over all `prompts`, `batch_size` at a time; None among `adapters` is the bare base."""
        began = time.perf_counter()
        for start in range(0, len(prompts), batch_size):
            self._generate(prompts[start : start + batch_size], adapters[start : start + batch_size], max_tokens)
        return len(prompts) * max_tokens / (time.perf_counter() - began)

    def _generate(self, prompts: Sequence[str], adapters: Sequence[str | None], max_tokens: int) -> None:
        batch = self._tokenizer(list(prompts), return_tensors="pt", padding=True)
        options = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "do_sample": False,
            "min_new_tokens": max_tokens,
            "max_new_tokens": max_tokens,
            "pad_token_id": self._tokenizer.pad_token_id,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # generation settings that greedy decoding does not read
            if not any(adapters):
                with self._model.disable_adapter():
                    output = self._model.generate(**options)
            else:
                output = self._model.generate(**options, adapter_names=[name or BASE for name in adapters])
        made = output.shape[1] - batch.input_ids.shape[1]
        if made != max_tokens:
            raise RuntimeError(f"PEFT made {made} tokens a prompt instead of {max_tokens}")
