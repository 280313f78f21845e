"""Settings: frozen, bounded, unknown keys refused. A leaf.

One flat namespace for people (flags, `PEFTSERVE_*`, YAML), cut into one frozen object per component, so that a
component sees its own settings only. `settings.py` reads them; nothing changes them afterwards.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails

from peftserve.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: Any) -> Any:
    """Bytes from `268435456`, `"256MiB"`, `"256M"` or `"1.5g"` (decimal and binary units, case ignored)."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().removesuffix("b")
    digits = text.rstrip("kmgi")
    unit = text[len(digits) :]
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with K, M, G, KiB, MiB or GiB") from None


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def _open_or_at_least(least: int) -> AfterValidator:
    def check(value: int) -> int:
        if value and value < least:
            raise ValueError(f"must be at least {least}, or 0 to leave it open")
        return value

    return AfterValidator(check)


DType = Literal["auto", "bfloat16", "float16", "float32"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class EngineConfig(_Frozen):
    """What the engine process needs; crosses to it as JSON."""

    model: str = Field(
        "smollm2-135m-instruct",
        description="The embedded default by name, or a local folder (Hugging Face, bitsandbytes NF4) or .gguf file",
    )
    data_dir: Path = Field(
        Path("~/.local/share/peftserve"),
        description="Adapters, their index and converted checkpoints live here",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs")
    dtype: DType = Field("auto", description="Activations and KV cache; auto is bfloat16")
    int8_activations: bool = Field(
        False,
        description="Round what the 4-bit layers multiply to 8 bits, block by block: more tokens/s of several streams, "
        "less exact (CPU with AVX-512 and VNNI only)",
    )
    adapter_dtype: Literal["auto", "model", "int8"] = Field(
        "auto",
        description="How LoRA and bottleneck weights are kept: model as activations are, int8 in 8 bits with a scale a "
        "rank row; auto is int8 on the CPU, unless activations are float32",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the engine; 0: a thread for each core the process may use"
    )
    eager: bool = Field(
        False, description="Run every step op by op instead of replaying captured ones (to debug kernels)"
    )
    max_model_len: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="Context limit in tokens, prefix included; 0 takes the model's own, or what the KV cache holds",
    )
    max_batch_tokens: int = Field(512, ge=1, le=1 << 17, description="Token budget of one step, decode first")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Sequences running at once")
    page_size: int = Field(16, ge=1, le=256, description="Tokens per KV page")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that sizes left open are measured to"
    )
    kv_cache_bytes: Annotated[Bytes, _open_or_at_least(2**16)] = Field(
        0, description="KV cache, prefix adapters included; 0 takes 256 MiB on the CPU, what is left on a GPU"
    )
    prefix_caching: bool = Field(
        True, description="Reuse the KV pages of equal prompt beginnings (same tenant, same adapter)"
    )
    adapter_device_bytes: Annotated[Bytes, _open_or_at_least(2**12)] = Field(
        0,
        description="Device memory for LoRA and bottleneck weights; 0 takes 64 MiB on the CPU, a sixteenth of what is "
        "left on a GPU",
    )
    adapter_host_bytes: Bytes = Field(512 * 2**20, ge=2**12, description="Host memory for parsed adapters")
    max_device_adapters: int = Field(128, ge=1, le=8192, description="Adapters of one kind on the device at once")
    max_pinned_share: float = Field(
        0.5, ge=0, le=1, description="Share of adapter memory, slots and (prefixes) KV cache that pins may hold"
    )
    max_adapter_rank: int = Field(128, ge=1, le=1024, description="Largest LoRA rank or bottleneck width accepted")
    adapter_retry_s: float = Field(5.0, ge=0, description="Pause before a failed adapter load is tried again, seconds")
    starvation_s: float = Field(
        2.0,
        gt=0,
        description="A request that could not be placed for this long is no longer delayed by others, seconds",
    )


class LimitsConfig(_Frozen):
    """Bounds on what clients send, checked before anything is allocated."""

    max_body_bytes: Bytes = Field(4 * 2**20, ge=1024, description="JSON request body")
    max_adapter_bytes: Bytes = Field(256 * 2**20, ge=1024, description="Uploaded adapter, config and weights together")
    max_adapters: int = Field(10_000, ge=1, description="Adapters per tenant")
    max_waiting: int = Field(1024, ge=1, description="Requests queued before new ones are answered 429")
    max_n: int = Field(16, ge=1, le=128, description="Largest n")
    max_logprobs: int = Field(20, ge=0, le=100, description="Largest top_logprobs")
    max_stop_strings: int = Field(16, ge=0, le=64, description="Stop strings per request")
    request_timeout_s: float = Field(600.0, gt=0, description="A request is aborted after this long, seconds")
    stream_stall_timeout_s: float = Field(
        60.0, gt=0, le=86_400, description="A stream whose client reads nothing of it for this long is aborted, seconds"
    )


class ServerConfig(_Frozen):
    """The two listeners and who may use them."""

    host: str = Field("127.0.0.1", description="Address of both listeners")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port, 0 for any free one")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC port, 0 for any free one")
    served_model_name: str = Field("", description="Name of the base model in the API; empty takes it from --model")
    api_keys: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="API key -> tenant; without keys everybody is tenant 'default'",
    )
    insecure: bool = Field(False, description="Allow listening beyond loopback without API keys")
    adapter_roots: list[Path] = Field(
        default_factory=list,
        description="Folders that /v1/load_lora_adapter may read from; empty refuses every path",
    )
    drain_s: float = Field(30.0, ge=0, description="On SIGTERM running requests get this long to finish, seconds")
    hang_timeout_s: float = Field(
        120.0, gt=0, description="An engine step longer than this counts as a hang: restart, seconds"
    )
    max_adapter_labels: int = Field(
        100, ge=0, description="Adapters with metric labels of their own; the rest share 'other'"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged")
    log_format: Literal["console", "json"] = Field("console", description="Log lines for people or for machines")

    @model_validator(mode="after")
    def _refuse_open_listener(self) -> Self:
        if not is_loopback(self.host) and not self.api_keys and not self.insecure:
            raise ValueError(
                f"host: refusing to listen on {self.host} without API keys; set api_keys, "
                "or pass --insecure if everybody who reaches this address may use the server"
            )
        return self


class Config(_Frozen):
    """All settings, by component."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)


def _describe(section: type[BaseModel], fault: ErrorDetails) -> str:
    """One line for one bad value; of secrets neither key nor value is shown."""
    text = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return text
    name = str(fault["loc"][0])
    if not section.model_fields[name].repr:
        return f"{name}: {text}"
    return f"{'.'.join(str(part) for part in fault['loc'])}: {text} (got {fault['input']!r})"


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine only."""
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build(values: dict[str, Any]) -> Config:
    """A `Config` from flat keys; raises `ConfigurationError` that lists every unknown key and every bad value."""
    import difflib

    from pydantic import ValidationError

    sections: dict[str, type[BaseModel]] = {
        "engine": EngineConfig,
        "limits": LimitsConfig,
        "server": ServerConfig,
    }
    owner = {key: name for name, section in sections.items() for key in section.model_fields}
    nested: dict[str, dict[str, Any]] = {name: {} for name in sections}
    faults: list[str] = []
    for key, value in values.items():
        if key in owner:
            nested[owner[key]][key] = value
        else:
            close = difflib.get_close_matches(key, owner, n=1)
            faults.append(f"{key}: no such setting" + (f"; did you mean {close[0]}?" if close else ""))
    built: dict[str, Any] = {}
    for name, section in sections.items():
        try:
            built[name] = section.model_validate(nested[name])
        except ValidationError as error:
            faults += [_describe(section, fault) for fault in error.errors()]
    if faults:
        raise ConfigurationError("invalid settings: " + "; ".join(faults), faults=faults)
    return Config(**built)
