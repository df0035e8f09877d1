"""What single parts of the CPU engine bring: a forward and backward pass with each part and without it, turn by turn.

    python benchmarks/engine_parts.py --data ../shared/data --set hh --pairs 4
    python benchmarks/engine_parts.py --data ../shared/data --set alpaca --pairs 1 --lora

Printed for each: median CPU seconds, the median of the ratios turn by turn, the share of the speed of oneDNN's product
[1024, 512] · [512, 1408] (measured right before and after each pass), and how far the gradient is off the whole engine's.

Useful for that share are only products that must be done, wherever they are: of layers 6 operations a weight and token, with
LoRA 4 and 6 for the adapters, in the last layer queries, outputs and MLP only where something is scored; of the head 6 a weight
and scored token, with LoRA 4. Attention, a product of the head that is made again, and whatever is no product count as nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import torch  # noqa: E402
from peer_inputs import LORA_RANK, SETS, Size, prepare  # noqa: E402

SIZE = Size(hidden=512, layers=8, vocabulary=50_000)
MIDDLE = 11 * SIZE.hidden // 4


def policy_and_trees(folder: Path, n_pairs: int, lora: bool) -> tuple[Any, list[Any]]:
    """The policy with random weights, and the first pairs as trees."""
    from preftune.config import Lora
    from preftune.data.template import build_trees
    from preftune.data.types import Example, Pair
    from preftune.engine.policy import Path as Way
    from preftune.engine.policy import Policy
    from preftune.model.load import load_model, open_renderer
    from preftune.model.lora import add_lora

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()][:n_pairs]
    pair = (Pair(0, 1, 1.0, 0.0),)
    examples = [
        Example(id=str(i), prompt=r["prompt"], responses=(r["chosen"], r["rejected"]), pairs=pair) for i, r in enumerate(rows)
    ]
    trees = build_trees(examples, open_renderer(str(folder / "model"), max_length=512))
    model = load_model(folder / "model", dtype=torch.float32)
    if lora:
        model = add_lora(model, Lora(r=LORA_RANK), base="base", seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # an adapter that is 0 gives half of the gradients away
                torch.nn.init.normal_(p, std=0.01)
    return Policy(model, Way("forest", "own")).train(), trees


def variants(policy: Any, lora: bool) -> dict[str, Callable[[], None]]:
    """What brings the engine into each state."""
    from preftune.engine.fused import use_fused
    from preftune.engine.narrow import use_narrow

    def whole_engine() -> None:
        use_fused(policy.model, True)
        use_narrow(policy.model, True)

    def last_layer_whole() -> None:
        whole_engine()
        use_narrow(policy.model, False)

    def adapters_by_peft() -> None:
        whole_engine()
        for module in policy.modules():
            if hasattr(module, "lora_A"):
                module.__dict__.pop("forward", None)

    found = {"as it is": whole_engine, "last layer whole": last_layer_whole}
    return found | ({"adapters by PEFT": adapters_by_peft} if lora else {})


def useful(n_tokens: int, n_scored: int, n_read: int, lora: bool) -> int:
    """Operations of the products that must be done; `n_read`: rows of the last layer that predict something scored."""
    d, m, layers = SIZE.hidden, MIDDLE, SIZE.layers
    square, mlp = d * d, 3 * d * m
    weights = ((layers - 1) * (4 * square + mlp) + 2 * square) * n_tokens + (2 * square + mlp) * n_read
    head = d * SIZE.vocabulary * n_scored
    if not lora:
        return 6 * (weights + head)
    first = 2 * 3 * square * n_tokens  # nothing learns below the first layer
    adapters = LORA_RANK * (((layers - 1) * (11 * d + 3 * m) + 4 * d) * n_tokens + (7 * d + 3 * m) * n_read)
    return 4 * (weights + head) - first + 6 * adapters


def product_speed() -> float:
    """Operations a CPU second of a product of a layer's size."""
    from preftune.engine.linear import product_t

    a, b = torch.randn(1024, 512), torch.randn(1408, 512)
    product_t(a, b)
    start = time.process_time()
    for _ in range(40):
        product_t(a, b)
    return 40 * 2 * 1024 * 512 * 1408 / (time.process_time() - start)


def passed(policy: Any, batch: Any) -> tuple[float, float, torch.Tensor]:
    """CPU seconds of one forward and backward pass, the product's speed around it, and the gradient."""
    from preftune.engine.inplace import gradients_in_place

    policy.zero_grad()
    before = product_speed()
    start = time.process_time()
    with gradients_in_place():
        logps = policy(batch)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    seconds = time.process_time() - start
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return seconds, (before + product_speed()) / 2, gradient


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--set", choices=SETS, default="hh")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "inputs"
        print(prepare(given.set, given.data, folder, SIZE, n_rows=given.pairs, max_length=512))
        policy, trees = policy_and_trees(folder, given.pairs, given.lora)
    batch = policy.pack(trees)
    n_tokens, n_scored, n_read = batch.tokens.shape[1], len(batch.source), len(batch.source.unique())
    work = useful(n_tokens, n_scored, n_read, given.lora)
    print(f"{n_tokens} tokens read, {n_scored} scored from {n_read} of them, {work / 1e9:.0f} GFLOP of products\n")
    states = variants(policy, given.lora)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in states}
    for turn in range(given.turns + 1):
        exact = None
        for name, set_up in states.items():
            set_up()
            seconds, speed, gradient = passed(policy, batch)
            exact = gradient if exact is None else exact
            if turn:  # the first meets every shape of a product for the first time
                taken[name].append((seconds, work / seconds / speed))
            elif name != "as it is":
                print(f"gradient, {name}: off by {float((gradient - exact).norm() / exact.norm()):.1e}")
    print("\n| engine | CPU s | times as long | of the product's speed |\n| --- | --- | --- | --- |")
    for name, times in taken.items():
        ratio = statistics.median(t[0] / own[0] for t, own in zip(times, taken["as it is"], strict=True))
        seconds, share = (statistics.median(t[i] for t in times) for i in (0, 1))
        print(f"| {name} | {seconds:.2f} | {ratio:.3f} | {share:.0%} |")


if __name__ == "__main__":
    main()
