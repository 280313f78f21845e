"""The layers of ARCHITECTURE.md, held by reading every import in the source: arrows point downwards only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "peftserve": ROOT / "server/peftserve",
    "peftserve_kernels": ROOT / "kernels/peftserve_kernels",
    "peftserve_client": ROOT / "clients/peftserve_client",
    "peftserve_proto": ROOT / "protos/peftserve_proto",
}

# For each part (longest match wins): the parts of ours that it may import, beside itself.
LEAVES = {"peftserve", "peftserve.types", "peftserve.errors", "peftserve.config", "peftserve.log"}
SPEC = {"peftserve.model.spec"}
ALLOWED: dict[str, set[str]] = {
    "peftserve": set(),
    "peftserve.types": set(),
    "peftserve.errors": {"peftserve.types"},
    "peftserve.config": {"peftserve.errors"},
    "peftserve.settings": LEAVES,
    "peftserve.log": {"peftserve.memory"},
    "peftserve.memory": set(),
    "peftserve.metrics": LEAVES | {"peftserve.engine.messages"},
    "peftserve.text": LEAVES,
    "peftserve.adapters": LEAVES | SPEC,
    "peftserve.model.spec": set(),
    "peftserve.model": LEAVES
    | SPEC
    | {
        "peftserve.memory",
        "peftserve.adapters",
        "peftserve.engine.plan",
        "peftserve.engine.sampler",
        "peftserve.engine.adapter_memory",
        "peftserve_kernels",
    },
    "peftserve.engine": LEAVES
    | {"peftserve.engine.plan", "peftserve.engine.messages", "peftserve.engine.adapter_memory"},
    "peftserve.engine.plan": {"peftserve.types"},
    "peftserve.engine.messages": {"peftserve.types"} | SPEC,
    "peftserve.engine.adapter_memory": {"peftserve.types"},
    "peftserve.engine.sampler": {"peftserve.types", "peftserve.engine.plan", "peftserve_kernels"},
    "peftserve.engine.build": LEAVES
    | SPEC
    | {"peftserve.adapters", "peftserve.engine", "peftserve.engine.messages", "peftserve.model", "peftserve_kernels"},
    "peftserve.engine.process": LEAVES
    | {"peftserve.engine", "peftserve.engine.messages", "peftserve.engine.build", "peftserve.log", "peftserve.memory"},
    "peftserve.api": LEAVES
    | SPEC
    | {
        "peftserve.adapters",
        "peftserve.engine.client",
        "peftserve.engine.messages",
        "peftserve.metrics",
        "peftserve.text",
        "peftserve_proto",
    },
    "peftserve.engine.client": LEAVES | {"peftserve.engine", "peftserve.engine.messages"},
    "peftserve.demo": LEAVES | {"peftserve.model", "peftserve_client"},
    "peftserve.app": {"*"},
    "peftserve.cli": LEAVES
    | {"peftserve.app", "peftserve.settings", "peftserve.model", "peftserve.demo", "peftserve_client", "peftserve.log"},
    "peftserve_kernels": set(),
    "peftserve_client": {"peftserve_proto"},
    "peftserve_proto": set(),
}
# Never imported by these parts, at any depth of our own modules: torch would cost the front end 200 MB and seconds.
TORCH_FREE_ENTRY_POINTS = ("peftserve.app", "peftserve.cli", "peftserve.engine.scheduler", "peftserve.engine.client")
HEAVY = {"torch", "transformers", "bitsandbytes", "peft", "triton"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            if "_pb2" in path.name:
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def imports(name: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that `name` imports; `from x import y` counts as x.y where that is a module."""
    tree = ast.parse(MODULES[name].read_text())
    is_package = MODULES[name].name == "__init__.py"
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join(anchor[: len(anchor) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        elif _is_type_checking(node) or (
            top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            continue
        else:
            pending.extend(ast.iter_child_nodes(node))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def part_of(module: str) -> str | None:
    """The longest key of ALLOWED that `module` lies in."""
    while module:
        if module in ALLOWED:
            return module
        module = module.rpartition(".")[0]
    return None


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards_only(name: str) -> None:
    part = part_of(name)
    assert part is not None, f"{name} belongs to no part: give it one in ALLOWED"
    allowed = ALLOWED[part]
    for target in imports(name):
        if target.split(".")[0] not in PACKAGES or "*" in allowed:
            continue
        target_part = part_of(target)
        assert target_part == part or target_part in allowed, f"{name} ({part}) may not import {target} ({target_part})"


@pytest.mark.parametrize("entry", TORCH_FREE_ENTRY_POINTS)
def test_the_front_end_and_the_scheduler_never_import_torch(entry: str) -> None:
    seen: set[str] = set()
    pending = [(entry, (entry,))]
    while pending:
        module, trail = pending.pop()
        for target in imports(module, top_level_only=True):
            assert target.split(".")[0] not in HEAVY, " -> ".join((*trail, target))
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target not in seen:
                seen.add(target)
                pending.append((target, (*trail, target)))


def test_the_source_folders_are_no_packages() -> None:
    for folder in ("server", "kernels", "protos", "clients", "bench"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ would shadow a package on the path"
