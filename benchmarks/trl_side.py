"""TRL's side of the comparison: its own trainer, tokenization and `train()`, set up to take the steps that preftune takes.

`PEERS` are the settings of it that are compared with. Nothing in TRL is made slower than it is; one of them makes it faster
than it is on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from preftune.config import Config
from preftune.model.load import load_model
from preftune.model.lora import add_lora

Seconds = tuple[float, float]
"""CPU time of the process over all its threads, and time by the clock."""


@dataclass(frozen=True)
class Peer:
    """How TRL is set up: everything that is not said here is its default."""

    what: str
    precompute: bool = True
    accumulate: int = 1  # micro-batches a step
    checkpointing: bool = False
    scored_only: bool = False  # the head on completion tokens only


PEERS = {
    "default": Peer("reference model each step, batch 4, gradient checkpointing", precompute=False, checkpointing=True),
    "precomputed": Peer("precomputed reference, batch 4"),
    "accumulate": Peer("precomputed reference, batch 1 × 4 accumulation", accumulate=4),
    "lean": Peer("the same, head on completions only", accumulate=4, scored_only=True),
}


def now() -> Seconds:
    return time.process_time(), time.perf_counter()


def since(start: Seconds) -> Seconds:
    cpu, wall = now()
    return cpu - start[0], wall - start[1]


def make_trainer(peer: Peer, config: Config, rows: list[dict[str, str]], folder: Path) -> Any:
    """TRL's trainer over `rows` in their order, with the optimizer, the lengths and the start weights of `config`."""
    from datasets import Dataset, disable_progress_bar
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    per_step, lora = config.batch.pairs_per_step, config.lora
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=config.precision == "bf16", seed=config.seed,
        report_to="none", disable_tqdm=True,
        max_steps=config.steps or -1, per_device_train_batch_size=per_step // peer.accumulate,
        gradient_accumulation_steps=peer.accumulate, train_sampling_strategy="sequential", dataloader_pin_memory=False,
        logging_steps=1, save_strategy="no", learning_rate=config.optim.lr, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=config.optim.weight_decay, max_grad_norm=config.optim.clip, max_length=config.batch.max_length,
        gradient_checkpointing=peer.checkpointing, precompute_ref_log_probs=peer.precompute,
        beta=config.loss_parameters["beta"],
    )  # fmt: skip
    adapters = (
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM") if lora.r else None
    )
    trainer = DPOTrainer(
        model=load_model(Path(str(config.model))) if adapters else str(config.model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config.model),
        peft_config=adapters,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def same_start(trainer: Any, config: Config) -> dict[str, Any]:
    """Gives TRL's adapters the weights that the job's begin with, and returns a copy of all weights that will learn."""
    if config.lora.r:
        adapted = add_lora(load_model(Path(str(config.model))), config.lora, base=str(config.model), seed=config.seed)
        adapters = {name: t for name, t in adapted.state_dict().items() if "lora_" in name}
        assert adapters and not trainer.model.load_state_dict(adapters, strict=False).unexpected_keys
    return learned(trainer)


def learned(trainer: Any) -> dict[str, Any]:
    """A copy of the weights that learn, by the names that a saved model gives them."""
    named = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in named.items()}


def watch(trainer: Any, *, after_step: Callable[[], Any], at_start: Callable[[], Any] = lambda: None) -> list[Seconds]:
    """The seconds of each of the trainer's steps, filled while it trains; `after_step` runs after each and is not counted.

    A step is all that happens between two calls: reading the rows, forward and backward, the update, the log.
    """
    from transformers import TrainerCallback

    steps: list[Seconds] = []

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            at_start()
            self.mark = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(since(self.mark))
            after_step()
            self.mark = now()

    trainer.add_callback(Turns())
    return steps


@contextmanager
def set_up(peer: Peer) -> Iterator[list[Seconds]]:
    """Inside, TRL's head reads what the peer says. Yields the seconds that TRL spends on precomputing the reference.

    On CUDA TRL picks the positions that are scored before it applies the head; elsewhere it applies the head to all. One
    function decides, and the copy of it that the forward pass asks is what is replaced here: the tiles stay those of a CPU.
    """
    from trl import DPOTrainer
    from trl.trainer import utils

    reference: list[Seconds] = []
    precompute = DPOTrainer._precompute_ref_logps

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = now()
        result = precompute(self, *args, **kwargs)
        reference.append(since(start))
        return result

    head = mock.patch.object(utils, "_use_triton", lambda device: True) if peer.scored_only else mock.patch.dict({}, {})
    with mock.patch.object(DPOTrainer, "_precompute_ref_logps", timed), head:
        yield reference


def tokens_read(trainer: Any, peer: Peer, per_step: int) -> list[int]:
    """Tokens of each step that one forward pass of TRL reads, padding included."""
    rows = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]
    size = per_step // peer.accumulate
    micro = [2 * size * max(rows[at : at + size]) for at in range(0, len(rows), size)]
    return [sum(micro[at : at + peer.accumulate]) for at in range(0, len(micro), peer.accumulate)]
