"""LoRA as PEFT saves it: y = W x + s B (A x), s = alpha / r, or alpha / sqrt(r) with `use_rslora`; and DoRA.

Fields after `LoraConfig` of PEFT 0.21 (`tuners/lora/config.py`), files after `save_pretrained`: per targeted module
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], with `use_dora` also
`.lora_magnitude_vector` [out].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftserve.adapters.faults import FaultList
from peftserve.adapters.formats import fields
from peftserve.adapters.formats.lora_targets import find_targets, module_names, pattern_values
from peftserve.adapters.formats.parsed import LoraAdapter, LoraModule
from peftserve.adapters.formats.tensors import TensorTable
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

_PREFIX = "base_model.model."
_NOT_YET = "not supported yet"

HONOURED = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
        "use_dora", "use_rslora",
    }
)  # fmt: skip
"""Fields that are read here."""

HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config",
    }
)  # fmt: skip
"""Fields that change nothing in the saved adapter's maths: provenance, training, and settings of refused switches.

`ensure_weight_tying` only concerns embeddings, which are refused as targets; the `*_config` of an initialisation count
only together with `init_lora_weights`, which is checked.
"""

REFUSED = {
    "alora_invocation_tokens": f"activated LoRA (aLoRA) is {_NOT_YET}",
    "arrow_config": f"Arrow routing is {_NOT_YET}",
    "fan_in_fan_out": "transposed layers (Conv1D) do not exist in this base",
    "kasa_config": "KaSA truncates the base model's weights, which all adapters share",
    "layer_replication": "it changes the number of layers of the base model, which all adapters share",
    "lora_bias": f"a bias on lora_B is {_NOT_YET}",
    "megatron_config": "Megatron layers are not supported",
    "modules_to_save": "fully trained modules are not supported: they replace weights of the shared base model",
    "monteclora_config": "Monte Carlo LoRA samples at random in every step; it is not supported",
    "target_parameters": f"LoRA on bare parameters is {_NOT_YET}",
    "trainable_token_indices": f"trained token embeddings are {_NOT_YET}",
    "use_bdlora": f"block-diagonal LoRA is {_NOT_YET}",
    "use_qalora": f"QA-LoRA is {_NOT_YET}",
    "velora_config": f"VeLoRA is {_NOT_YET}",
}
"""Fields that change the maths when they are on, and why they are refused."""

_INITS_THAT_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_INITS_THAT_CHANGE_THE_BASE = re.compile(r"pissa|pissa_niter_\d+|olora|corda|loftq|lora_ga")

_UNSUPPORTED_TENSORS = (
    (".lora_embedding_", f"LoRA on embeddings is {_NOT_YET}"),
    (".base_layer.", "it is a weight of the base model; adapters cannot bring their own"),
    (".lora_B.bias", f"a bias on lora_B is {_NOT_YET}"),
    (".modules_to_save.", "fully trained modules are not supported"),
    (".token_adapter.", f"trained token embeddings are {_NOT_YET}"),
    (".lm_head.", f"changing the output head is {_NOT_YET}"),
)


@dataclass(frozen=True, slots=True)
class _Scaling:
    """The rank and alpha of each module; None where the config does not say it properly."""

    rank: int | None
    alpha: float | None
    rank_of: Mapping[str, int]
    alpha_of: Mapping[str, float]
    rslora: bool

    def of(self, module: str) -> tuple[int, float] | None:
        rank, alpha = self.rank_of.get(module, self.rank), self.alpha_of.get(module, self.alpha)
        if rank is None or alpha is None:
            return None
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def parse(config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec, max_rank: int) -> LoraAdapter:
    """The adapter that PEFT would build from these files on this base.

    Raises `InvalidAdapterError` with all faults. `max_rank` is the largest rank accepted.
    """
    faults = FaultList()
    fields.refuse_fields(config, HONOURED | HARMLESS, REFUSED, faults)
    _check_switches(config, faults)
    scaling = _read_scaling(config, spec, faults)
    table = TensorTable(tensors, faults)
    dora = fields.flag(config, "use_dora", faults)
    modules = _read_modules(config, table, scaling, spec, max_rank, faults, dora=dora)
    table.refuse_rest(lambda name: _explain(name, spec, dora=dora))
    if faults:
        raise faults.error()
    return LoraAdapter(modules)


def _check_switches(config: Mapping[str, Any], faults: FaultList) -> None:
    if config.get("bias", "none") not in ("none", None):
        faults.add(f"config field bias ({fields.show(config['bias'])}): trained biases are not supported, only 'none'")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        faults.add(
            f"config field task_type ({fields.show(config['task_type'])}): only CAUSAL_LM adapters generate text"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and _INITS_THAT_CHANGE_THE_BASE.fullmatch(init):
        faults.add(
            f"config field init_lora_weights ({fields.show(init)}): this changes the base model's weights, "
            "so the adapter fits only its own copy of it; PEFT's save_pretrained turns it into a plain LoRA when given "
            "path_initial_model_for_weight_conversion"
        )
    elif not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in _INITS_THAT_KEEP_THE_BASE)):
        faults.add(f"config field init_lora_weights ({fields.show(init)}): not known here")


def _read_scaling(config: Mapping[str, Any], spec: ModelSpec, faults: FaultList) -> _Scaling:
    return _Scaling(
        rank=fields.count(config, "r", faults),
        alpha=fields.number(config, "lora_alpha", faults),
        rank_of=pattern_values(
            config, "rank_pattern", spec, faults, wants="a whole number of at least 1", valid=fields.is_count
        ),
        alpha_of=pattern_values(config, "alpha_pattern", spec, faults, wants="a number", valid=fields.is_number),
        rslora=fields.flag(config, "use_rslora", faults),
    )


def _read_modules(
    config: Mapping[str, Any],
    table: TensorTable,
    scaling: _Scaling,
    spec: ModelSpec,
    max_rank: int,
    faults: FaultList,
    *,
    dora: bool,
) -> dict[tuple[int, int], LoraModule]:
    """The modules that are sound; `faults` has what is wrong with the others."""
    names = module_names(spec)
    modules: dict[tuple[int, int], LoraModule] = {}
    too_large: dict[int, str] = {}
    for name in find_targets(config, spec, faults):
        layer, target = names[name]
        scaled = scaling.of(name)
        rank = scaled[0] if scaled else None
        base = fields.describe(spec)
        a = table.take(
            f"{_PREFIX}{name}.lora_A.weight",
            (rank, target.in_features),
            f"rank {rank} by the {target.in_features} inputs of {target.name} in {base}",
        )
        b = table.take(
            f"{_PREFIX}{name}.lora_B.weight",
            (target.out_features, rank),
            f"the {target.out_features} outputs of {target.name} in {base} by rank {rank}",
        )
        magnitude = None
        if dora:
            magnitude = table.take(
                f"{_PREFIX}{name}.lora_magnitude_vector",
                (target.out_features,),
                f"the {target.out_features} outputs of {target.name} in {base}",
            )
        if scaled and scaled[0] > max_rank:
            too_large.setdefault(scaled[0], name)
        if scaled and a and b:
            modules[layer, target.index] = LoraModule(rank=scaled[0], scale=scaled[1], a=a, b=b, magnitude=magnitude)
    for rank, name in too_large.items():
        faults.add(f"rank {rank} (at {name}) is above this server's limit of {max_rank} (max_adapter_rank)")
    return modules


def _explain(name: str, spec: ModelSpec, *, dora: bool) -> str:
    """What a tensor that no target accounts for may be."""
    for part, text in _UNSUPPORTED_TENSORS:
        if part in name:
            return text
    match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)", name)
    if match is None:
        return "a LoRA file holds base_model.model.<module>.lora_A.weight and .lora_B.weight only"
    if match[2] == "lora_magnitude_vector" and not dora:
        return "it belongs to DoRA, which the config does not turn on (use_dora)"
    if match[1] in module_names(spec):
        return "the config does not target this module (target_modules, exclude_modules, layers_to_transform)"
    return f"{fields.describe(spec)} has no module of this name"
