"""Train and measure the demo adapters on the served base: ``python -m peftserve.demo.train --model DIR --out DIR``."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from peftserve.demo.attached import Attached, attach_new, attach_saved
from peftserve.demo.evaluate import accuracy, encode_prompt
from peftserve.demo.tasks import TASKS, Example, Task, examples
from peftserve.log import get_logger

log = get_logger()
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW with linear warm-up and decay; the loss covers the answer's tokens only."""

    learning_rate: float
    steps: int
    batch_size: int = 16
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    seed: int = 0


SETTINGS: dict[str, TrainingSettings] = {
    "order-yaml": TrainingSettings(learning_rate=1e-3, steps=120),
    "ticket-router": TrainingSettings(learning_rate=1e-2, steps=250),
    "iso-date": TrainingSettings(learning_rate=2e-3, steps=120),
}


def load_dense_base(model_dir: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in ``model_dir`` (a Hugging Face folder, or one .gguf) as it is served: bf16, projections through NF4.

    Every projection of the decoder layers is quantized from bf16 (blocks of 64, double-quantized absmax) and
    dequantized again, so adapters learn against the error that NF4 makes.
    """
    gguf = next((path.name for path in sorted(model_dir.glob("*.gguf"))), None)
    source: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), **source)
    if gguf:
        source["quantization_config"] = GgufConfig(dequantize=True)
    model = LlamaForCausalLM.from_pretrained(str(model_dir), dtype=torch.bfloat16, **source)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
                weight.copy_(dequantize_4bit(packed, state))
    return model, tokenizer


def batches(
    task: Task, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``settings.steps`` batches (input_ids, labels), both int64 [batch, length], padded on the right.

    Labels are the next tokens of the answer and ``IGNORED_LABEL`` elsewhere. Batches hold examples of similar
    length, in random order.
    """
    drawn = examples(task.name, "train", settings.steps * settings.batch_size, settings.seed)
    rng = random.Random(settings.seed)
    window = 8 * settings.batch_size
    for start in range(0, len(drawn), window):
        encoded = sorted((_encode(tokenizer, e) for e in drawn[start : start + window]), key=lambda e: len(e[0]))
        groups = [encoded[i : i + settings.batch_size] for i in range(0, len(encoded), settings.batch_size)]
        for group in rng.sample(groups, len(groups)):
            length = max(len(ids) for ids, _ in group)
            input_ids = torch.full((len(group), length), tokenizer.eos_token_id)
            labels = torch.full((len(group), length), IGNORED_LABEL)
            for row, (ids, answer_start) in enumerate(group):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, answer_start - 1 : len(ids) - 1] = torch.tensor(ids[answer_start:])
            yield input_ids, labels


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Token ids of prompt, answer and end of turn, and the index where the answer starts."""
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def fit(attached: Attached, task: Task, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings) -> float:
    """Train the attached adapter in place; returns the mean loss of the last tenth of the steps."""
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, settings.warmup_steps, settings.steps
    )
    losses: list[float] = []
    for step, (input_ids, labels) in enumerate(batches(task, tokenizer, settings), start=1):
        # Padding stands on the right, where causal attention hides it from every labelled position: no mask needed.
        hidden = attached.model.model(
            input_ids, past_key_values=attached.start_cache(len(input_ids)), use_cache=True
        ).last_hidden_state
        labelled = labels != IGNORED_LABEL
        loss = cross_entropy(attached.model.lm_head(hidden[labelled]).float(), labels[labelled])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            log.info("step", task=task.name, step=step, of=settings.steps, loss=round(sum(losses[-10:]) / 10, 4))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def train_one(task: Task, model_dir: Path, out: Path, held_out_count: int) -> dict[str, Any]:
    """Train, save, load again from the files, and measure one adapter; returns the measurement as plain values."""
    settings = SETTINGS[task.name]
    torch.manual_seed(settings.seed)
    model, tokenizer = load_dense_base(model_dir)
    held_out = examples(task.name, "held_out", held_out_count, settings.seed)
    base, base_answers = accuracy(Attached(model), tokenizer, held_out)
    told, told_answers = accuracy(Attached(model), tokenizer, held_out, task.instruction)
    log.info("base", task=task.name, base=base, base_with_instruction=told, example=base_answers[0])

    folder = out / task.name
    started = time.monotonic()
    attached = attach_new(task, model, tokenizer)
    loss = fit(attached, task, tokenizer, settings)
    seconds = time.monotonic() - started
    attached.save(folder)

    model, tokenizer = load_dense_base(model_dir)
    score, answers = accuracy(attach_saved(task, model, folder), tokenizer, held_out)
    wrong = [
        {"prompt": example.prompt, "expected": example.answer, "got": answer}
        for example, answer in zip(held_out, answers, strict=True)
        if answer.strip() != example.answer
    ]
    result = {
        "task": task.name,
        "kind": task.kind,
        "held_out_examples": len(held_out),
        "accuracy": {"adapter": score, "base": base, "base_with_instruction": told},
        "final_loss": loss,
        "training_seconds": round(seconds),
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "settings": asdict(settings),
        "example": {
            "prompt": held_out[0].prompt,
            "adapter": answers[0],
            "base": base_answers[0],
            "base_with_instruction": told_answers[0],
        },
        "wrong": wrong,
    }
    (out / f"{task.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log.info("done", task=task.name, accuracy=score, base=base, loss=loss, seconds=result["training_seconds"])
    return result


def main(
    model: Annotated[Path, typer.Option(help="Folder with the base model: a Hugging Face folder, or a .gguf.")],
    out: Annotated[Path, typer.Option(help="Folder to write <name>/ and <name>.json to.")],
    only: Annotated[str | None, typer.Option(help=f"Train only this one of: {', '.join(TASKS)}.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="How many held-out examples to measure on.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the demo adapters and measure each against the bare base."""
    if only is not None and only not in TASKS:
        raise typer.BadParameter(f"unknown task {only!r}; choose one of: {', '.join(TASKS)}", param_hint="--only")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        if only in (None, task.name):
            train_one(task, model, out, held_out)


if __name__ == "__main__":
    typer.run(main)
