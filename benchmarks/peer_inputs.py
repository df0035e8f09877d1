"""What both sides are given: plain-text preferences cut to length, a tokenizer of their text, a Llama with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

SEED, LORA_RANK, PAIRS_PER_STEP = 0, 16, 4
LR = {"full": 1e-4, "lora": 1e-3}
END, PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class Source:
    """Where a data set is, and what it is like."""

    file: str
    what: str


SETS = {
    "hh": Source("hh_rlhf/harmless-base.test.subset.jsonl.gz", "long prompts, short answers"),
    "alpaca": Source("alpaca_eval/annotations/FuseChat-Llama-3.1-8B-Instruct.json.gz", "short prompts, long answers"),
}


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings."""

    hidden: int
    layers: int
    vocabulary: int  # rows of the embedding; the tokenizer uses as many as its text gives


def prepare(name: str, data: Path, folder: Path, size: Size, *, n_rows: int, max_length: int) -> str:
    """Writes model/ and rows.jsonl under `folder`. Returns a line on what they are."""
    from preftune.data.read import read_examples

    folder.mkdir(parents=True)
    source = read_examples(data / SETS[name].file, quarantine=folder / "aside.jsonl")
    rows = [as_text(e) for e in source.examples if e.pairs and e.pairs[0].confidence > 0.5]
    tokenizer = make_tokenizer([t for row in rows for t in row.values()], size.vocabulary)
    n_total = make_model(folder / "model", tokenizer, size, max_length)
    order = shuffled(len(rows))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        n, n_cut = 0, 0
        for i in order:
            short = fitted(rows[i], tokenizer, max_length)
            if short["chosen"] == short["rejected"]:  # the same up to where both are cut
                continue
            n_cut += short != rows[i]
            n += 1
            stream.write(json.dumps(short) + "\n")
            if n == n_rows:
                break
        assert n == n_rows, f"{name} has only {n} rows"
    used = f"{n_total:,} weights, {len(tokenizer)} of the vocabulary in use"
    return f"{name}: {len(rows)} rows, {n} drawn, {n_cut} of them cut; {used}"


def as_text(example: Any) -> dict[str, str]:
    """An example as plain text: the space makes the boundary that of two tokens, whoever tokenizes."""
    turns = [("user", example.prompt)] if isinstance(example.prompt, str) else example.prompt
    names = {"user": "Human: ", "assistant": "Assistant: "}
    prompt = "\n\n".join(names.get(role, "") + content.strip() for role, content in turns) + "\n\nAssistant:"
    pair = example.pairs[0]
    chosen, rejected = (f" {example.responses[k].strip()}" for k in (pair.winner, pair.loser))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def fitted(row: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, str]:
    """The row cut so that neither side has to: the oldest part of a prompt beyond three quarters, then the tails of replies."""
    prompt = row["prompt"]
    while (extra := len(tokenizer(prompt).input_ids) - 3 * max_length // 4) > 0:
        prompt = prompt[tokenizer(prompt, return_offsets_mapping=True).offset_mapping[extra][0] :].lstrip()
    room = max_length - 1 - len(tokenizer(prompt).input_ids)  # one for the end of the text
    cut = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        text = row[side]
        while len(tokenizer(text).input_ids) > room:
            text = text[: tokenizer(text, return_offsets_mapping=True).offset_mapping[room][0]].rstrip()
        cut[side] = text
    return cut


def shuffled(n: int) -> Iterator[int]:
    import numpy as np

    yield from np.random.Generator(np.random.Philox(key=SEED)).permutation(n).tolist()


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Byte-level BPE over the text: as many tokens as pairs that occur twice give, at most `vocabulary`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def make_model(folder: Path, tokenizer: Any, size: Size, max_length: int) -> int:
    """A Llama with random weights and the tokenizer, in a folder; its number of weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=11 * size.hidden // 4,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=max(1024, max_length), tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def job_settings(
    inputs: Path, folder: Path, *, lora: bool, n_steps: int, max_length: int, precision: str = "fp32"
) -> dict[str, Any]:
    """preftune's settings; TRL's are read off them."""
    rows = (inputs / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(rows[: n_steps * PAIRS_PER_STEP]), encoding="utf-8")
    return {
        "model": str(inputs / "model"), "data": str(data), "out": str(folder / "run"), "cache": str(folder / "cache"),
        "device": "cpu", "seed": SEED, "steps": n_steps, "precision": precision, "loss.beta": 0.1,
        "batch.pairs_per_step": PAIRS_PER_STEP, "batch.max_length": max_length,
        "optim.lr": LR["lora" if lora else "full"], "optim.schedule": "constant", "optim.warmup": 0, "optim.clip": 1.0,
        "optim.weight_decay": 0.0, "eval.every": 0, "samples.n": 0, "checkpoint.every": 0,
    } | ({"lora.r": LORA_RANK} if lora else {})  # fmt: skip
