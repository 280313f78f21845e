"""GPT-2's byte-level alphabet: how byte-level BPE spells each byte as one printable character.

Source: `bytes_to_unicode` of GPT-2's encoder.py. Printable Latin-1 characters stand for themselves, the other bytes for
the code points from 256 on, in order.
"""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_OF_CHAR: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF_CHAR.update({chr(256 + i): byte for i, byte in enumerate(_OTHERS)})


def token_to_bytes(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for.

    A token with any character outside the alphabet is an added one, spelled as it reads: `tokenizers` does the same.
    """
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()
