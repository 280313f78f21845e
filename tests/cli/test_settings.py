"""Where settings come from, which source wins, and what is refused."""

from pathlib import Path

import pytest

from peftserve import settings
from peftserve.errors import ConfigurationError


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\ngrpc-port: 2\nmax_batch_tokens: 3\nkv_cache_bytes: 1GiB\n")
    environ = {"PEFTSERVE_GRPC_PORT": "20", "PEFTSERVE_MAX_BATCH_TOKENS": "30", "HOME": "/root"}
    built = settings.load({"max_batch_tokens": "300", "port": None}, environ, file)
    assert built.server.port == 1
    assert built.server.grpc_port == 20
    assert built.engine.max_batch_tokens == 300
    assert built.engine.kv_cache_bytes == 2**30
    assert built.engine.page_size == 16


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\n")
    assert settings.load({}, {"PEFTSERVE_CONFIG": str(file)}).server.port == 1


def test_every_field_can_come_from_every_source(tmp_path: Path) -> None:
    built = settings.load({}, {})
    sections = {"server": built.server, "engine": built.engine, "limits": built.limits}
    for section, names in settings.sections().items():
        for name in names:
            value = getattr(sections[section], name)
            text = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            text = "" if value == [] else text
            from_flag = settings.load({name: text}, {})
            from_variable = settings.load({}, {f"PEFTSERVE_{name.upper()}": text})
            assert from_flag == from_variable == built, name


def test_sizes_may_be_left_open_but_not_tiny() -> None:
    assert settings.load({"kv_cache_bytes": "0"}, {}).engine.kv_cache_bytes == 0
    with pytest.raises(
        ConfigurationError, match="kv_cache_bytes: must be at least 65536, or 0 to leave it open"
    ) as caught:
        settings.load({"kv_cache_bytes": "1K", "adapter_device_bytes": "4095", "gpu_memory_utilization": "1.5"}, {})
    assert "adapter_device_bytes: must be at least 4096" in caught.value.message
    assert "gpu_memory_utilization: Input should be less than or equal to 1" in caught.value.message


def test_lists_and_mappings(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one=a\ntwo=b\n")
    for text in ("one=a,two=b", '{"one": "a", "two": "b"}', f"@{keys}"):
        assert settings.load({"api_keys": text}, {}).server.api_keys == {"one": "a", "two": "b"}
    assert settings.load({"adapter_roots": "/a, /b"}, {}).server.adapter_roots == [Path("/a"), Path("/b")]
    with pytest.raises(ConfigurationError, match=r"--api-keys: write KEY=VALUE"):
        settings.load({"api_keys": "nothing"}, {})
    with pytest.raises(ConfigurationError, match=r"PEFTSERVE_API_KEYS: not valid JSON"):
        settings.load({}, {"PEFTSERVE_API_KEYS": "{oops"})


def test_a_key_that_comes_twice_is_refused_and_not_shown(tmp_path: Path) -> None:
    for text in ("secret=a,k=b,secret=c", '{"secret": "a", "k": "b", "secret": "c"}'):
        with pytest.raises(ConfigurationError, match=r"--api-keys: entry 3 has the same key as entry 1$"):
            settings.load({"api_keys": text}, {})
    file = tmp_path / "config.yaml"
    file.write_text("grpc_port: 1\napi_keys:\n  secret: a\n  k: b\n  secret: c\ngrpc-port: 2\n")
    with pytest.raises(ConfigurationError) as caught:
        settings.load({}, {}, file)
    assert caught.value.faults == [
        f"{file}: line 6 has the same key as line 1",
        f"{file}: api_keys: line 5 has the same key as line 3",
    ]
    file.write_text("{port: 1, port: 2}")
    with pytest.raises(ConfigurationError, match="line 1 has the same key as line 1"):
        settings.load({}, {}, file)


def test_unknown_names_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"PEFTSERVE_POTR: no such setting; did you mean PEFTSERVE_PORT\?"):
        settings.load({}, {"PEFTSERVE_POTR": "1"})
    file = tmp_path / "config.yaml"
    file.write_text("max_batch_token: 5\nzzz: 1\n")
    with pytest.raises(ConfigurationError, match=r"did you mean max_batch_tokens\?.*zzz: no such setting$") as caught:
        settings.load({}, {}, file)
    assert len(caught.value.faults) == 2


def test_the_clients_variables_are_no_settings() -> None:
    settings.load({}, {"PEFTSERVE_URL": "http://x", "PEFTSERVE_API_KEY": "k", "PEFTSERVE_GRPC": "y:1"})


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not valid YAML"), ("- a\n- b", "must be a mapping"), ("!!python/object:os.system {}", "not valid YAML")],
)
def test_files_that_are_no_settings(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        settings.load({}, {}, file)
    with pytest.raises(ConfigurationError, match="No such file"):
        settings.load({}, {}, tmp_path / "absent.yaml")


def test_values_are_checked_with_their_bounds() -> None:
    with pytest.raises(ConfigurationError, match=r"port: .* 65535 \(got '99999'\)") as caught:
        settings.load({"port": "99999", "page_size": "0"}, {})
    assert len(caught.value.faults) == 2
