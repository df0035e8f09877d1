"""What `preftune plan` predicts beside what `preftune train` takes: peak memory of the process, case by case.

python benchmarks/memory.py                        # all cases, some minutes
python benchmarks/memory.py --case small:full:1024 --case small:lora:1024

A case is shape:weights:tokens_per_microbatch. Models have random weights and the texts are random words; each plan and each run
is a process of its own, and the peak is what the system reports of it (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {  # width, layers, vocabulary
    "tiny": (128, 2, 2_000),
    "small": (256, 4, 32_000),
    "medium": (512, 8, 50_000),
    "wide": (512, 4, 128_000),
}
CASES = [
    "small:full:1024", "small:full:4096", "small:lora:1024", "small:lora:4096",
    "medium:full:2048", "medium:full:6144", "medium:lora:4096", "wide:full:2048", "wide:lora:2048",
]  # fmt: skip


def build(folder: Path, shape: str) -> tuple[Path, Path]:
    """A model folder and a preference file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, layers, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = folder / shape
    LlamaForCausalLM(config).save_pretrained(str(model))
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>").save_pretrained(str(model))
    rng = random.Random(0)
    data = folder / "pairs.jsonl"

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(("kettle", "lamp", "ferry", "map", "of", "the", "sorry"), k=rng.randint(least, most)))

    rows = [{"prompt": f"{i} {text(10, 40)}", "chosen": f" {text(20, 60)}", "rejected": f" {text(20, 60)}"} for i in range(96)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def peak(words: list[str]) -> tuple[int, str]:
    """Peak memory in bytes of `python -m preftune WORDS`, and what it wrote to standard output."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'preftune', *sys.argv[1:]], stdout=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout), done.stderr


def measure(folder: Path, case: str, *, steps: int = 4) -> tuple[int, int, int]:
    """Bytes predicted, bytes measured, bytes of both that are the process without a model."""
    shape, weights, tokens = case.split(":")
    model, data = build(folder, shape)
    settings = [
        f"model={model}", f"data={data}", f"steps={steps}", f"batch.tokens_per_microbatch={tokens}", "batch.pairs_per_step=16",
        f"lora.r={16 if weights == 'lora' else 0}", "samples.max_tokens=16", f"cache={folder / 'cache'}",
    ]  # fmt: skip
    plan = subprocess.run(
        [sys.executable, "-m", "preftune", "plan", *settings, "--memory", "1TiB", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if plan.returncode:
        raise SystemExit(plan.stderr)
    memory = json.loads(plan.stdout)["memory"]
    measured, _ = peak(["train", *settings, f"out={folder / case.replace(':', '-')}", "--quiet"])
    return memory["total"], measured, memory["parts"]["process"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help="shape:full or lora:tokens; default: all of the table")
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    print(
        "| case | predicted, MiB | measured, MiB | of it the process | predicted / measured |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in given.case or CASES:
            predicted, measured, base = (n / 2**20 for n in measure(Path(folder), case, steps=given.steps))
            print(f"| {case} | {predicted:.0f} | {measured:.0f} | {base:.0f} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
