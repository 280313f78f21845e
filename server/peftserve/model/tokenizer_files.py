"""Making the tokenizer files that the front end reads (tokenizer.json, tokenizer_config.json, chat_template.jinja)."""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from peftserve.errors import ConfigurationError
from peftserve.model.gguf_file import GgufFile
from peftserve.model.stop_tokens import TOKENIZER_FILE, chat_end_ids

logger = logging.getLogger(__name__)

# `tokenizer.ggml.pre` values whose split llama.cpp and transformers agree on; others fall back to GPT-2's.
_KNOWN_SPLITS = {"llama-bpe", "llama3", "llama-v3", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-2"}


def write_from_gguf(file: GgufFile, folder: Path) -> None:
    """The tokenizer that a GGUF file describes, and generation_config.json with every id that ends a turn or a text."""
    tokenizer = _load(file.path.parent, gguf_file=file.path.name)
    split = file.metadata("tokenizer.ggml.pre")
    if file.metadata("tokenizer.ggml.model") == "gpt2":
        if split == "smollm":
            # SmolLM's tokenizer takes digits one by one before the byte-level split; transformers leaves that out.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in _KNOWN_SPLITS:
            logger.warning("%s: unknown pre-tokenizer %r; text is split as GPT-2 does", file.path, split)
    tokenizer.save_pretrained(folder)
    eos = file.metadata("tokenizer.ggml.eos_token_id")
    stops = ([eos] if eos is not None else []) + sorted(chat_end_ids(folder) - {eos})
    ids = {
        "bos_token_id": file.metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops,
        "pad_token_id": file.metadata("tokenizer.ggml.padding_token_id"),
    }
    known = {key: value for key, value in ids.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")


def write_from_folder(source: Path, folder: Path) -> None:
    """tokenizer.json from the older files in `source` (tokenizer.model, or vocab.json and merges.txt)."""
    _load(source).save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigurationError(f"{source} has no {TOKENIZER_FILE}, and its tokenizer has no fast version to make one")


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"{folder}: no tokenizer can be made: {error}") from error
