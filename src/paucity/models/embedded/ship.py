"""From a trained model to the shipped folder: bfloat16 weights, tokenizer, and a card that states its quality."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...measure.data import HELD_OUT_MODULES, held_out_python
from ...measure.prompts import TASKS
from ...measure.quality import bits_per_byte
from ...measure.retrieval import retrieval_accuracy
from .corpus import END

LENGTHS = (1024, 2048, 4096)


def ship(
    model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, record: dict[str, Any], *, num_prompts: int = 100
) -> None:
    """Write ``folder``: an ordinary Hugging Face folder with ``card.json`` and ``CARD.md``; a former one is replaced.

    Args:
        model: trained, in any float dtype.
        tokenizer: without special tokens of its own; the end token comes to stand before every text.
        folder: of the shipped files.
        record: how the model was trained, kept in the card.
        num_prompts: of each retrieval task at each of `LENGTHS`.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left"
    )
    fast.model_max_length = model.config.max_position_embeddings
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(temporary)
    fast.save_pretrained(temporary)
    card = record | measure(model, fast, num_prompts=num_prompts)
    (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (temporary / "CARD.md").write_text(card_text(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_prompts: int = 100, seed: int = 0
) -> dict[str, Any]:
    """What the card states: bits per byte of the held-out modules, and accuracy of each retrieval task and length."""
    text = held_out_python()
    quality = bits_per_byte(model, tokenizer, text, length=4096, stride=2048, seed=seed)
    retrieval = {
        task: {
            length: retrieval_accuracy(
                model, tokenizer, task=task, length=length, filler=text, num_prompts=num_prompts, seed=seed
            ).accuracy.value
            for length in LENGTHS
        }
        for task in TASKS
    }
    assert quality.bits_per_byte is not None  # a text was given
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "held_out_modules": list(HELD_OUT_MODULES),
        "held_out_bits_per_byte": quality.bits_per_byte.value,
        "num_prompts": num_prompts,
        "retrieval": retrieval,
    }


def card_text(card: dict[str, Any]) -> str:
    """The card in words, from its figures."""
    stages = "\n".join(
        f"| {s['length']} | {s['batch']} | {s['minutes']:g} | {s['recall_share']:.0%} |" for s in card["stages"]
    )
    tasks = "\n".join(
        f"| {task} | {' | '.join(f'{value:.0%}' for value in by_length.values())} |"
        for task, by_length in card["retrieval"].items()
    )
    lengths = " | ".join(f"{length} tokens" for length in LENGTHS)
    modules = textwrap.fill(", ".join(card["held_out_modules"]), 110)
    return f"""# Card of the embedded model

Llama architecture, {card["num_parameters"]:,} parameters in bfloat16, byte-level BPE of 4,096 tokens with single
digits, context 8,192, trained at up to 4,096 tokens. It is a test object for sparse methods, not an assistant.

**Data.** Source of Python's standard library and its tests (26.7 MB, without the held-out modules and their tests;
Python Software Foundation License), ten public-domain books of Project Gutenberg (16.4 M characters), and recall tasks
generated over both: passkeys, keys with numbers, keys with several numbers, chains of variables, random strings that
come again. The recall tasks have the form of the retrieval measures, so their accuracy says that the model retrieves
from its context, not that it understands other phrasings.

**Training.** {card["step"]:,} steps, {card["tokens"]:,} tokens, {card["seconds"] / 60:.0f} minutes on two CPU cores
that other work shared, seed {card["seed"]}, from random weights; Muon and AdamW at {card["rate"]:g}, falling to 0.

| length | batch | minutes | sequences of recall tasks |
|---|---|---|---|
{stages}

**Quality.** {card["held_out_bits_per_byte"]:.3f} bits per byte, in windows of 4,096 tokens, on standard-library modules
that were not trained on:
{modules}.

Greedy answers to {card["num_prompts"]} prompts a cell, with held-out source around the facts (exact, or the share of
several answers that was found):

| task | {lengths} |
|---|{"---|" * len(LENGTHS)}
{tasks}
"""
