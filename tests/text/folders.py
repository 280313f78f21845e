"""Tokenizer folders made on the spot: byte-level and SentencePiece-like with byte fallback."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers

from tests.tiny_models import make_tokenizer

BOS, EOS = "<s>", "</s>"
_PIECES = ["▁", "▁the", "▁a", "he", "llo", "▁wor", "ld", *"abcdefghijklmnopqrstuvwxyz.,!?'"]


def byte_level(folder: Path) -> Path:
    """The tiny models' tokenizer, as `save_pretrained` leaves it."""
    make_tokenizer().save_pretrained(folder)
    return folder


def sentencepiece(folder: Path) -> Path:
    """A Llama-2-style tokenizer: ▁ for spaces, byte tokens for what it has no piece for, first space stripped."""
    vocab = {token: i for i, token in enumerate([BOS, EOS, "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *_PIECES])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([BOS, EOS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}}))
    return folder
