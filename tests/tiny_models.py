"""Tiny random checkpoints of every supported family, with a tokenizer, made by transformers.

Weights have unit-scale outputs (not transformers' 0.02, which makes every distribution flat), and norms and biases are
random too, so that a forgotten one shows.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB_SIZE = 320
MAX_POSITIONS = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "A server keeps one base model in memory and many small adapters beside it. Every request names the adapter it "
    "wants, and one batch mixes requests of different adapters. The weights stay quantised, the answers stay exact."
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size)
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama_tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama_bias": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama_llama3_rope": lambda: LlamaConfig(**_SIZES, rope_parameters=dict(_LLAMA3_ROPE)),
    "llama_linear_rope": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    ),
    "smollm3": lambda: SmolLM3Config(**_SIZES),  # layer 3 has no RoPE; tied
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen2_sliding": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=32),
    "qwen3_bias": lambda: Qwen3Config(**_SIZES, head_dim=32, attention_bias=True, tie_word_embeddings=True),
}
"""Every variant by name; the families are the words before the first underscore."""


def make_model(variant: str, seed: int = 0, **sizes: int) -> Any:
    """A float32 transformers model of `variant` with random weights, in evaluation mode; `sizes` change its config."""
    config = CONFIGS[variant]()
    config.update(sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.5)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.eval()


def make_checkpoint(
    variant: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> Path:
    """`folder`, holding a full-precision Hugging Face checkpoint of `variant` with tokenizer and chat template."""
    make_model(variant, seed, **sizes).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCAB_SIZE` tokens (special tokens 0, 1, 2 first), with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
