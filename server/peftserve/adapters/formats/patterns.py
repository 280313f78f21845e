"""Module-name patterns of PEFT configs, evaluated safely.

PEFT treats them as regular expressions for Python's `re`, which an uploaded config could use to burn a core for hours.
RE2 takes time linear in the text and bounded memory instead. What it cannot express (look-around, back-references) or
reads differently from `re`, and what `re` refuses, is refused, so a pattern that is accepted means here what it means
in PEFT.
"""

import re
from collections.abc import Callable, Iterable, Sequence

import re2  # type: ignore[import-untyped]

MAX_PATTERN_CHARS = 2_000
MAX_REGEX_KEYS = 64
_RE2_BYTES = 1 << 18

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+")
# POSIX classes and `{,n}` mean something else to RE2 than to Python.
_READ_DIFFERENTLY = re.compile(r"\[:|\{,")
# `re.compile` goes through a range that ignores case character by character: seconds for some hundred wide ones. With
# the last of Latin-1 in the place of all beyond, a pattern is well formed as before.
_BEYOND_LATIN_1 = re.compile(r"[^\x00-\xff]")


def compile_fullmatch(pattern: str) -> Callable[[str], bool]:
    """`re.fullmatch(pattern, text)` as a predicate. Raises ValueError with the reason a pattern is refused."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"a pattern of {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}")
    if _READ_DIFFERENTLY.search(pattern):
        raise ValueError("'[:' and '{,' are not supported in patterns")
    options = re2.Options()
    options.max_mem = _RE2_BYTES
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0]
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(
            f"not a regular expression that can be evaluated safely ({text}); list the module names instead"
        ) from None
    try:
        # Never run: only to refuse what PEFT could not read, such as a repeated assertion (`^?`).
        re.compile(_BEYOND_LATIN_1.sub("\xff", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression of Python's ({error})") from None
    return lambda text: compiled.fullmatch(text) is not None


def first_matches(keys: Sequence[str], names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Which of `keys` PEFT applies to each of `names`, and what is wrong with the keys.

    PEFT (`utils.other.get_pattern_key`) takes the first key in file order with `re.match(rf"(.*\\.)?({key})$", name)`.
    Plain dotted names are looked up; others are evaluated as patterns. A key that matches none of `names` is a fault:
    it was written for another base. Returns (name -> key, faults).
    """
    names = list(names)
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            by_suffix.setdefault(".".join(parts[start:]), []).append(name)
    chosen: dict[str, str] = {}
    faults: list[str] = []
    num_regex = 0
    known = set(names)
    for key in keys:
        if _PLAIN.fullmatch(key):
            plain = key.removeprefix("^").replace("\\.", ".")
            matched = ([plain] if plain in known else []) if key.startswith("^") else by_suffix.get(plain, [])
        else:
            num_regex += 1
            if num_regex > MAX_REGEX_KEYS:
                faults.append(f"more than {MAX_REGEX_KEYS} regular expressions; write module names instead")
                break
            try:
                matches = compile_fullmatch(rf"(.*\.)?({key})")
            except ValueError as error:
                faults.append(f"key {key[:200]!r}: {error}")
                continue
            matched = [name for name in names if matches(name)]
        if not matched:
            faults.append(f"key {key[:200]!r} matches no module of the base")
        for name in matched:
            chosen.setdefault(name, key)
    return chosen, faults
