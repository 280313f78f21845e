"""Greedy answers and exact-match accuracy of a base with or without an adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from peftserve.demo.attached import Attached
from peftserve.demo.tasks import Example, exact_match

MAX_NEW_TOKENS = 48


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one user message in the model's chat template, up to where the answer begins."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


@torch.inference_mode()
def greedy(attached: Attached, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, at most ``MAX_NEW_TOKENS`` tokens each, up to the end-of-turn token.

    Only prompts of equal length share a batch: no padding, so each answer is what the prompt alone would get.
    """
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        ids = encode_prompt(tokenizer, prompt)
        by_length[len(ids)].append((index, ids))
    answers = [""] * len(prompts)
    for group in by_length.values():
        rows = _decode_batch(attached, tokenizer.eos_token_id, torch.tensor([ids for _, ids in group]))
        for (index, _), text in zip(group, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            answers[index] = text
    return answers


def _decode_batch(attached: Attached, eos_token_id: int, input_ids: torch.Tensor) -> list[list[int]]:
    """New token ids of each row of ``input_ids`` [batch, length], without the end-of-turn token."""
    batch_size = input_ids.shape[0]
    cache = attached.start_cache(batch_size)
    rows: list[list[int]] = [[] for _ in range(batch_size)]
    open_rows = set(range(batch_size))
    for _ in range(MAX_NEW_TOKENS):
        logits = attached.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        input_ids = logits[:, -1].argmax(-1, keepdim=True)
        for row in sorted(open_rows):
            token = int(input_ids[row, 0])
            if token == eos_token_id:
                open_rows.remove(row)
            else:
                rows[row].append(token)
        if not open_rows:
            break
    return rows


def accuracy(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Example], instruction: str = ""
) -> tuple[float, list[str]]:
    """Share of exact answers (0 to 1), and the answers; ``instruction`` goes before each message."""
    prompts = [f"{instruction}\n\n{example.prompt}" if instruction else example.prompt for example in held_out]
    answers = greedy(attached, tokenizer, prompts)
    right = sum(exact_match(answer, example.answer) for answer, example in zip(answers, held_out, strict=True))
    return right / len(held_out), answers
