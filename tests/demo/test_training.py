"""Training and evaluation of the three adapter kinds, end to end on a tiny random Llama."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftserve.demo.attached import Attached, attach_new, attach_saved
from peftserve.demo.evaluate import MAX_NEW_TOKENS, encode_prompt, greedy
from peftserve.demo.tasks import TASKS, examples
from peftserve.demo.train import IGNORED_LABEL, TrainingSettings, batches, fit

# PEFT 0.21 asks transformers 5 for an attribute that has a new name there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SETTINGS = TrainingSettings(learning_rate=1e-2, steps=30, batch_size=4, warmup_steps=2)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with a chat template, so that no file is needed."""
    specials = ["</s>", "<s>"]
    vocab = {symbol: i for i, symbol in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", chat_template=TEMPLATE)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def _logits(attached: Attached, ids: list[int]) -> torch.Tensor:
    return attached.model(torch.tensor([ids]), past_key_values=attached.start_cache(1), use_cache=True).logits


def test_labels_are_the_answer_and_the_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = replace(SETTINGS, steps=5)
    labelled: list[str] = []
    for input_ids, labels in batches(TASKS["iso-date"], tokenizer, settings):
        for ids, row in zip(input_ids, labels, strict=True):
            (places,) = (row != IGNORED_LABEL).nonzero(as_tuple=True)
            assert torch.equal(ids[places[:-1] + 1], row[places[:-1]])
            assert row[places[-1]] == tokenizer.eos_token_id
            labelled.append(tokenizer.decode(row[places[:-1]]))
    expected = [example.answer for example in examples("iso-date", "train", 20)]
    assert sorted(labelled) == sorted(expected)


@pytest.mark.parametrize("name", TASKS)
def test_training_lowers_the_loss(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    untrained = attach_new(TASKS[name], copy.deepcopy(model), tokenizer)
    before = fit(untrained, TASKS[name], tokenizer, replace(SETTINGS, learning_rate=0.0))
    after = fit(attach_new(TASKS[name], model, tokenizer), TASKS[name], tokenizer, SETTINGS)
    # Both runs see the same batches, so the difference is training alone; a prefix moves a random model only a little.
    assert after < 0.99 * before


@pytest.mark.parametrize("name", TASKS)
def test_a_saved_adapter_computes_what_was_trained(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = copy.deepcopy(model)
    ids = encode_prompt(tokenizer, "On 3 May 1998.")
    bare = _logits(Attached(base), ids)
    trained = attach_new(TASKS[name], model, tokenizer)
    fit(trained, TASKS[name], tokenizer, SETTINGS)
    trained.save(tmp_path)
    expected, loaded = _logits(trained, ids), _logits(attach_saved(TASKS[name], base, tmp_path), ids)
    # The files hold bf16: about three digits.
    torch.testing.assert_close(loaded, expected, rtol=0.05, atol=0.05)
    assert (loaded - bare).abs().max() > 0.5


def test_greedy_answers_are_those_of_generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    attached = attach_new(TASKS["ticket-router"], model, tokenizer)
    assert isinstance(attached.adapter, PeftModel)
    prompts = ["one", "two", "fifteen"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        output = attached.adapter.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert greedy(attached, tokenizer, prompts) == expected
    assert len(set(expected)) == len(prompts)
