"""transformers, with PEFT on top, on the very weights that are served."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from peftserve.model.dense import dense_state
from peftserve.model.spec import TARGET_NAMES
from tests.model.parity import Expected

TARGET_SETS = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": list(TARGET_NAMES),
}


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in `folder` as a transformers model with the dequantised NF4 values in `dtype`."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dense_state(folder), strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model.eval()


@contextmanager
def with_adapter(base: Any, folder: Path | None) -> Iterator[Any]:
    """`base` with the PEFT adapter in `folder`, or bare; `base` is as before afterwards."""
    if folder is None:
        yield base
        return
    model = PeftModel.from_pretrained(base, folder)
    try:
        yield model.eval()
    finally:
        if hasattr(model.base_model, "unload"):
            model.base_model.unload()


def save_lora(
    base: Any,
    folder: Path,
    *,
    rank: int,
    targets: str,
    seed: int,
    gain: float = 0.2,
    rslora: bool = False,
    dora: bool = False,
) -> Path:
    """A LoRA as PEFT saves it: for an input of unit scale its update is of scale 2 `gain` (with alpha = 2 r).

    As a DoRA with magnitudes that differ from the norms of the base's rows by a tenth or so.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=TARGET_SETS[targets],
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                scale = parameter.shape[1] ** -0.5 * (1.0 if "lora_A" in name else gain)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    model.base_model.unload()
    return folder


def save_prefix(base: Any, folder: Path, *, num_tokens: int, seed: int, like: Sequence[int] = ()) -> Path:
    """A prefix as PEFT saves it: random with unit scale, or the K/V of the first tokens of `like`, slightly disturbed.

    A trained prefix resembles the latter; a random one sends a real model into chaos, where rounding decides.
    """
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=num_tokens, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        (embeddings,) = (p for name, p in model.named_parameters() if "prompt_encoder" in name)
        noise = torch.randn(embeddings.shape, generator=generator)
        embeddings.copy_(_kv_of(base, like[:num_tokens]) + 0.05 * noise if like else noise)
    model.save_pretrained(folder)
    return folder


def save_prompt(base: Any, folder: Path, *, num_tokens: int, seed: int, encoder: str = "") -> Path:
    """Prompt tuning as PEFT saves it, P-tuning with an `encoder` (MLP, LSTM): embeddings like those of real tokens."""
    config: Any = PromptTuningConfig(num_virtual_tokens=num_tokens, task_type="CAUSAL_LM")
    if encoder:
        config = PromptEncoderConfig(
            num_virtual_tokens=num_tokens,
            encoder_reparameterization_type=encoder,
            encoder_hidden_size=24,
            task_type="CAUSAL_LM",
        )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                scale = float(base.get_input_embeddings().weight.std()) if "embedding" in name else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def _kv_of(base: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """K and V of tokens in PEFT's layout: [n, layers * 2 * kv_heads * head_dim]."""
    cache = base(input_ids=torch.tensor([token_ids]), use_cache=True).past_key_values
    halves = [half[0].transpose(0, 1).flatten(1) for layer in cache.layers for half in (layer.keys, layer.values)]
    return torch.cat(halves, dim=1)


@torch.no_grad()
def judge(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Expected:
    """What `model` thinks at each position of `tokens` after `prompt`, in one pass.

    When `tokens` are what it thinks likeliest everywhere, they are its own greedy continuation, by induction.
    """
    return Expected.from_logits(continuation_logits(model, prompt, tokens))


@torch.no_grad()
def continuation_logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """The logits [T, vocab], float32, that `model` has before each of the T `tokens`."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[-len(tokens) - 1 : -1].float()  # counted from the end: PEFT gives those of a prompt's tokens, too
