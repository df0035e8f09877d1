"""The GPU benchmark without a GPU: it runs on a tiny model, its losses agree, and it counts operations as torch does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_inputs
    import gpu_sides

    return gpu_inputs, gpu_sides


def test_it_runs_whole_goes_on_and_its_losses_agree(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    def run(case: str) -> str:
        words = ["--tiny", "--device", "cpu", "--json", str(file), "--steps", "2", "--warmup", "1", "--case", case]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        gpu.main()
        return capsys.readouterr().out

    file = tmp_path / "gpu.json"
    run("tiny:hh:lora")
    found = json.loads(file.read_text())
    case = found["cases"]["tiny:hh:lora"]
    assert list(case["sides"]) == ["preftune:branches", "peer:4", "peer:16"] and "error" not in case
    for side in case["sides"].values():
        assert side["error"] is None and side["seconds"] > 0 and len(side["losses"]) == 3 and len(side["each"]) == 2
        assert abs(side["losses"][0] - 0.693147) < 1e-5, "before an update the policy is the reference"
    assert case["largest_loss_difference"] < 1e-3
    assert case["sides"]["preftune:branches"]["tokens"] < case["sides"]["peer:4"]["tokens"]
    assert found["about"]["lengths"]["hh"]["prompt"]
    again = run("tiny:hh:lor?")
    assert "tiny:hh:lora: measured before" in again and json.loads(file.read_text())["cases"] == found["cases"]
    with pytest.raises(SystemExit, match="9B:hh:lora; a case is MODEL:LENGTHS:TUNING"):
        run("9B:hh:lora")


@pytest.mark.parametrize("padded", [False, True])
def test_operations_are_what_torch_counts(benchmark: Any, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything but attention, which torch counts as a full square and not as what a causal mask leaves."""
    from preftune.engine.policy import Path as ScoringPath
    from preftune.engine.policy import Policy

    inputs, sides = benchmark
    trees = inputs.make_trees(inputs.TINY_LENGTHS["hh"], 3, vocabulary=512, longest=64)
    model = inputs.make_model(inputs.TINY, torch.device("cpu"), longest=64)
    policy = Policy(model, ScoringPath("rows" if padded else "forest", "own"))
    from preftune.engine import linear
    from preftune.engine.fused import use_fused
    from preftune.engine.narrow import use_narrow

    monkeypatch.setattr(linear, "_LEAST_WORK", 0)  # attention's own products all go by oneDNN, and so are not counted

    use_fused(model, False)  # oneDNN's products are not in torch's table
    use_narrow(model, False)  # a GPU computes its last layer whole
    with FlopCounterMode(display=False) as counter:
        policy(policy.pack(trees), as_packed=True).sum().backward()
    by_kind = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for kind, n in by_kind.items() if "mm" in kind and "bmm" not in kind)
    config = model.config
    pairs = sum(
        len(t.prompt) ** 2 / 2 * (len(t.branches) if padded else 1)
        + sum((len(b.ids) - 1) * len(t.prompt) + (len(b.ids) - 1) ** 2 / 2 for b in t.branches)
        for t in trees
    )
    attention = 12 * pairs * config.hidden_size * config.num_hidden_layers
    expected = sides.operations(model, trees, padded=padded) - attention
    assert abs(counted - expected) / expected < 0.02, (by_kind, expected)


def test_memory_that_is_short_halves_the_micro_batch_and_says_so(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.engine.policy import Path as ScoringPath

    _, sides = benchmark
    model = torch.nn.Linear(2, 2)
    start = model.weight.detach().clone()
    tried: list[tuple[int | None, int]] = []

    def steps(side: Any, model: Any, trees: Any, run: Any) -> Any:
        tried.append((side.pairs, run.tokens))
        model.weight.data.zero_()
        if side.name == "broken":
            raise RuntimeError("no kernel\nfor this")
        if (side.pairs or run.tokens) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return sides.Result(seconds=1.0)

    monkeypatch.setattr(sides, "_steps", steps)
    run = sides.Run(32, 8192, 1, 1, 1.0, 64)
    path = ScoringPath("forest", "own")
    assert sides.measure_side(sides.Side("peer:16", path, pairs=16), model, [], run).seconds == 1.0
    assert tried == [(16, 8192), (8, 8192), (4, 8192)]
    assert sides.measure_side(sides.Side("preftune", path), model, [], run).error == "out of memory"
    assert tried[-1] == (None, 512) and torch.equal(model.weight, start), "the weights are put back"
    assert sides.measure_side(sides.Side("broken", path), model, [], run).error == "no kernel"


def test_lengths_follow_their_quantiles(benchmark: Any) -> None:
    inputs, _ = benchmark
    for lengths in inputs.LENGTHS.values():
        trees = inputs.make_trees(lengths, 2000, vocabulary=1000, longest=1024)
        for found, quantiles in (([len(t.prompt) for t in trees], lengths.prompt),
                                 ([len(b.ids) for t in trees for b in t.branches], lengths.answer)):  # fmt: skip
            assert np.allclose(np.quantile(found, inputs.QUANTILES[2:5]), quantiles[2:5], rtol=0.12)
        assert max(len(t.prompt) + len(b.ids) for t in trees for b in t.branches) <= 1024
        assert all(len(b.ids) > 0 and len(t.pairs) == 1 for t in trees for b in t.branches)
