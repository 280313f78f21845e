"""Where settings come from: command line > `PEFTSERVE_*` environment > YAML file (`--config`) > defaults.

Each source gives the flat keys of `config.py`; `config.build` checks names and values of all of them together.
An unknown `PEFTSERVE_*` variable or YAML key is refused, because a misspelt limit that is silently ignored is worse
than a server that does not start.
"""

import difflib
import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftserve import config
from peftserve.errors import ConfigurationError

ENV_PREFIX = "PEFTSERVE_"

# Read by the command line's client commands, the kernels, the tests or `load` itself; no setting of the server.
OTHER_VARIABLES = frozenset(
    f"{ENV_PREFIX}{name}" for name in ("CONFIG", "URL", "GRPC", "API_KEY", "KERNELS", "CPU_ISA", "TEST_DATA_DIR")
)


_SECTIONS: dict[str, type[BaseModel]] = {
    "server": config.ServerConfig,
    "engine": config.EngineConfig,
    "limits": config.LimitsConfig,
}


def sections() -> dict[str, dict[str, FieldInfo]]:
    """Every setting by its flat name, in the sections of `config.py`."""
    return {name: dict(model.model_fields) for name, model in _SECTIONS.items()}


def fields() -> dict[str, FieldInfo]:
    """Every setting by its flat name."""
    return {name: info for section in sections().values() for name, info in section.items()}


def shape(info: FieldInfo) -> type:
    """`dict`, `list`, `bool`, or `str` for everything that is written as one word."""
    origin: object = typing.get_origin(info.annotation) or info.annotation
    shapes: tuple[type, ...] = (dict, list, bool)
    for kind in shapes:
        if origin is kind:
            return kind
    return str


def parse_text(text: str, info: FieldInfo) -> Any:
    """The value that `text` from a flag or an environment variable stands for.

    Words and numbers stay text: pydantic reads them. Lists are comma-separated, mappings `key=value,key=value`, and
    both may be JSON. `@path` reads the text from a file, which keeps API keys off the command line.
    """
    kind = shape(info)
    if kind not in (dict, list):
        return text
    if text.startswith("@"):
        text = _read(Path(text[1:]))
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON ({error.msg} at character {error.pos})") from None
    parts = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    if kind is list:
        return parts
    pairs = [part.partition("=") for part in parts]
    if not all(key and separator and value for key, separator, value in pairs):
        raise ValueError("write KEY=VALUE,KEY=VALUE or a JSON object")
    return _unique([(key.strip(), value.strip()) for key, _, value in pairs])


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Settings among `PEFTSERVE_*`. Raises `ConfigurationError` naming every variable that is not a setting."""
    known = fields()
    values: dict[str, Any] = {}
    faults: list[str] = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key not in known:
            faults.append(f"environment variable {variable}: no such setting{_hint(key, list(known), variable)}")
            continue
        try:
            values[key] = parse_text(text, known[key])
        except ValueError as error:
            faults.append(f"environment variable {variable}: {error}")
    if faults:
        raise ConfigurationError("; ".join(faults), faults=faults)
    return values


def from_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file: one flat mapping; `max-batch-tokens` is the same as `max_batch_tokens`.

    Raises `ConfigurationError` for a file that cannot be read, is no mapping, or holds unknown keys or one twice.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(_read(path))
        document = loader.get_single_node()
        content = None if document is None else loader.construct_document(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}{where}: not valid YAML", field="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: must be a mapping of settings", field="config")
    known = list(fields())
    values = {_flat(key): value for key, value in content.items()}
    faults = [f"{path}: {key}: no such setting{_hint(key, known)}" for key in values if key not in known]
    faults += [f"{path}: {fault}" for fault in _repetitions(document)]
    if faults:
        raise ConfigurationError("; ".join(faults), faults=faults)
    return values


def _flat(key: object) -> str:
    return str(key).replace("-", "_")


def _repetitions(document: Any) -> list[str]:
    """Faults of a YAML mapping, and of the mappings that are its values: keys that came before."""
    import yaml

    def repeated(mapping: Any, name_of: Callable[[object], object]) -> list[str]:
        return _repeated("line", ((name_of(key.value), key.start_mark.line + 1) for key, _ in mapping.value))

    faults = repeated(document, _flat)
    for setting, value in document.value:
        if isinstance(value, yaml.MappingNode):
            faults += [f"{_flat(setting.value)}: {fault}" for fault in repeated(value, lambda key: key)]
    return faults


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of them. Raises ValueError for a key that came before."""
    faults = _repeated("entry", ((key, place) for place, (key, _) in enumerate(pairs, start=1)))
    if faults:
        raise ValueError(faults[0])
    return dict(pairs)


def _repeated(unit: str, keys: Iterable[tuple[object, int]]) -> list[str]:
    """Faults of those of (key, place) that came before. They tell places alone: keys may be secret."""
    places: dict[object, int] = {}
    faults = []
    for key, place in keys:
        if key in places:
            faults.append(f"{unit} {place} has the same key as {unit} {places[key]}")
        places.setdefault(key, place)
    return faults


def load(flags: Mapping[str, Any], environ: Mapping[str, str], config_file: Path | None = None) -> config.Config:
    """All sources merged and checked. `flags` are flat keys as given on the command line; None means not given.

    Raises `ConfigurationError` listing every fault: unknown names, unreadable values, values out of bounds.
    """
    known = fields()
    given: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in flags.items():
        if value is None:
            continue
        try:
            given[key] = parse_text(value, known[key]) if isinstance(value, str) and key in known else value
        except ValueError as error:
            faults.append(f"--{key.replace('_', '-')}: {error}")
    if faults:
        raise ConfigurationError("; ".join(faults), faults=faults)
    if config_file is None and environ.get("PEFTSERVE_CONFIG"):
        config_file = Path(environ["PEFTSERVE_CONFIG"])
    file_values = from_yaml(config_file) if config_file else {}
    return config.build(file_values | from_environment(environ) | given)


def _hint(key: str, known: list[str], variable: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if not close:
        return ""
    return f"; did you mean {ENV_PREFIX + close[0].upper() if variable else close[0]}?"


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"{path}: {reason}", field="config") from None
