"""The end-of-sequence ids of a checkpoint. Reads JSON only."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from peftserve.errors import ConfigurationError

TOKENIZER_FILE = "tokenizer.json"

T = TypeVar("T", bound=msgspec.Struct)

CHAT_END_TOKENS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>"}
)
"""Special tokens that end a turn or a text in the supported families (llama.cpp's end-of-generation list)."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


class _TokenizerConfig(msgspec.Struct):
    eos_token: str | dict[str, Any] | None = None

    @property
    def eos(self) -> str | None:
        if isinstance(self.eos_token, dict):
            content = self.eos_token.get("content")
            return content if isinstance(content, str) else None
        return self.eos_token


class _Ids(msgspec.Struct):
    eos_token_id: int | list[int] | None = None

    @property
    def ids(self) -> frozenset[int]:
        if self.eos_token_id is None:
            return frozenset()
        return frozenset([self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id)


def read_stop_token_ids(folder: Path) -> frozenset[int]:
    """All ids that end a generation: `eos_token_id` of config.json and of generation_config.json, and the tokenizer's
    own `eos_token`, which is where chat fine-tunes keep their end of turn. Raises `ConfigurationError`.
    """
    ids = _read(folder / "config.json", _Ids).ids | _read(folder / "generation_config.json", _Ids).ids
    eos = _read(folder / "tokenizer_config.json", _TokenizerConfig).eos
    if eos is not None:
        added = _read(folder / TOKENIZER_FILE, _TokenizerFile).added_tokens
        ids |= {token.id for token in added if token.content == eos}
    return ids


def chat_end_ids(folder: Path) -> frozenset[int]:
    """The ids of those `CHAT_END_TOKENS` that are special tokens of the tokenizer.json in `folder`."""
    added = _read(folder / TOKENIZER_FILE, _TokenizerFile).added_tokens
    return frozenset(token.id for token in added if token.special and token.content in CHAT_END_TOKENS)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
