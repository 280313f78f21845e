"""The model's tokenizer and chat template, from its checkpoint folder: `tokenizers` and jinja2, no transformers."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from peftserve.errors import ConfigurationError, InvalidRequestError
from peftserve.text.byte_level import token_to_bytes
from peftserve.text.chat import ChatTemplate

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads at once.

    `folder` holds `tokenizer.json`, and optionally `tokenizer_config.json` and `chat_template.jinja`.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"cannot read the tokenizer: {error}") from error
        except Exception as error:  # tokenizers raises bare Exception on a bad file
            raise ConfigurationError(f"{path}: not a tokenizer file: {error}") from error
        # A saved tokenizer may cut or pad by itself; lengths are the server's business.
        self.backend.no_truncation()
        self.backend.no_padding()
        # The whole file as Python objects would take 30 MB for a moment, and leave holes.
        decoder = self.backend.decoder
        self.is_byte_level = decoder is not None and _is_byte_level(json.loads(decoder.__getstate__()))
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        config = _read_json(folder / "tokenizer_config.json")
        self.chat_template = _read_chat_template(folder, config)
        self._max_token_bytes = _max_token_bytes(self.backend) if self.is_byte_level else None
        self.token_bytes = lru_cache(maxsize=1 << 16)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Releases the GIL on the way."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def min_tokens(self, text: str) -> int:
        """As many tokens as `text` has at least, without encoding it; 1 where nothing is known."""
        if self._max_token_bytes is None:
            return 1
        return max(1, -(-len(text.encode("utf-8", "surrogatepass")) // self._max_token_bytes))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids outside the vocabulary have none."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins. Raises `InvalidRequestError`."""
        # The template writes the special tokens itself.
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, to be encoded without special tokens. Raises `InvalidRequestError`."""
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; send a prompt instead", field="messages")
        return self.chat_template.render(messages)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (`Ġthe`), None outside the vocabulary."""
        return self.backend.id_to_token(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for by itself; cached."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return token_to_bytes(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's byte fallback
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def _is_byte_level(decoder: Mapping[str, Any]) -> bool:
    """Whether decoding is GPT-2's byte table and nothing else."""
    if decoder.get("type") == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return decoder.get("type") == "ByteLevel"


def _max_token_bytes(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Bytes of text that one token of a byte-level vocabulary can stand for at most; None where that has no bound.

    A normalizer may shorten the text before, and an added token may swallow all white space beside it.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if tokenizer.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
        return None
    # In GPT-2's byte table a character is a byte.
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return max((1, *map(len, vocabulary), *(len(token.content.encode()) for token in added)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return value if isinstance(value, dict) else {}


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """`chat_template.jinja`, or `chat_template` of `tokenizer_config.json`: a text, or named texts and a `default`."""
    source: Any
    try:
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        source = config.get("chat_template")
    if isinstance(source, list):
        source = {item["name"]: item["template"] for item in source}.get("default")
    if not source:
        return None
    variables = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
    return ChatTemplate(source, variables)


def _content(token: str | Mapping[str, Any]) -> str:
    """A special token is written as its text, or as an AddedToken with `content`."""
    return token if isinstance(token, str) else str(token["content"])
