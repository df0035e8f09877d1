"""A training step that computes nothing: the real policy, backward pass and optimizer on tensors without values.

    ledger = rehearse(make_model, way, goal, steps, config.optim)
    ledger.peaks()["step"], ledger.at_peak("step")["activations"]          # bytes

Under torch's FakeTensorMode every operation says which shapes it returns and allocates nothing, and a dispatch mode keeps the
books: each storage that an operation makes, its bytes, and when the last reference to it goes. So whatever the engine does
(adapters, tiles of the head, kept probabilities, functions with a backward pass of their own) is counted as it is done, for an
architecture of any size. What happens inside one operation (a kernel's own scratch memory) is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.config import Optim
from preftune.data.types import Tree
from preftune.engine import head
from preftune.engine.policy import Path, Policy
from preftune.losses.records import Mismatched
from preftune.training.optim import WeightWatch, clip, make_optimizer
from preftune.training.step import Goal, Micro, backward, evaluate

Step = Sequence[Sequence[Tree]]
"""The micro-batches of one optimizer step."""

KINDS = ("weights", "gradients", "optimizer", "head", "prepared", "activations")


# Blocks that oneDNN and torch hold for each shape of a product (engine/linear.py), in bytes. Fitted, not derived: two runs of
# benchmarks/memory.py with 128 shapes held instead of 16 took 1.7 and 2.1 MiB more a shape, holes included.
_PREPARED = [384 << 10] * 4
_LARGE = 1 << 16  # bytes from which on it is asked who made a block


@dataclass(slots=True)
class Ledger:
    """Every allocation and release in order. An entry is (storage, bytes): bytes below 0 are a release."""

    entries: list[tuple[int, int]] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)  # name, and the entry that it begins with
    kinds: dict[int, str] = field(default_factory=dict)  # storage -> one of KINDS; "activations" where none is named
    flops: int = 0  # so far
    flops_step: int = 0  # forward and backward of the last step
    n_weights: int = 0
    n_trainable: int = 0

    def live(self) -> Iterator[tuple[str, int, int, int]]:
        """(phase, entry, storage, bytes held after it), entry by entry."""
        starts = {at: name for name, at in self.phases}
        phase, held = "", 0
        for at, (storage, n) in enumerate(self.entries):
            phase, held = starts.get(at, phase), held + n
            yield phase, at, storage, held

    def peaks(self) -> dict[str, int]:
        """The most that was held at once, in bytes, by phase."""
        most: dict[str, int] = {}
        for phase, _, _, held in self.live():
            most[phase] = max(most.get(phase, 0), held)
        return most

    def at_peak(self, phase: str) -> dict[str, int]:
        """What was held, in bytes by kind, at the moment of `phase` when it was most."""
        last = max((held, at) for name, at, _, held in self.live() if name == phase)[1]
        held = dict.fromkeys(KINDS, 0)
        for storage, n in self.entries[: last + 1]:
            held[self.kinds.get(storage, "activations")] += n
        return held


class _Recorder(TorchDispatchMode):
    """Writes a ledger. Integers (indices, masks, counts) are computed for real where they depend on no fake tensor."""

    def __init__(self, ledger: Ledger, n_shapes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self.n_shapes = ledger, n_shapes
        self.names: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.n = 0
        self.prepared: OrderedDict[Hashable, range] = OrderedDict()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
        from torch.utils._pytree import tree_leaves

        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor for its device
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        whole = all(_whole(x) and not isinstance(x, FakeTensor) for x in given)
        if whole and (given or _makes_integers(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.ledger.flops += _flops(func, args, kwargs, result)
        if self.n_shapes and func._overloadpacket.__name__ == "_linear_pointwise":
            self.prepare((args[0].shape, args[0].stride(), args[1].shape, args[1].stride()))
        for made in tree_leaves(result):
            if isinstance(made, FakeTensor):
                self.see(made)
        return result

    def phase(self, name: str) -> None:
        """From here on is another part of the run."""
        self.ledger.phases.append((name, len(self.ledger.entries)))

    def prepare(self, shape: Hashable) -> None:
        """Enters what oneDNN holds for a product of this shape; what was not met for longest is let go."""
        if shape in self.prepared:
            self.prepared.move_to_end(shape)
            return
        numbers = self.prepared[shape] = range(self.n, self.n + len(_PREPARED))
        self.n = numbers.stop
        self.ledger.entries += zip(numbers, _PREPARED, strict=True)
        self.ledger.kinds.update(dict.fromkeys(numbers, "prepared"))
        while len(self.prepared) > self.n_shapes:
            _, old = self.prepared.popitem(last=False)
            self.ledger.entries += [(number, -n) for number, n in zip(old, _PREPARED, strict=True)]

    def see(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, entered where it is new."""
        storage = tensor.untyped_storage()
        if storage not in self.names:
            self.names[storage] = number = self.n
            self.n += 1
            n_bytes, entries = storage.nbytes(), self.ledger.entries
            entries.append((number, n_bytes))
            if n_bytes >= _LARGE and _in_head():
                self.ledger.kinds[number] = "head"
            weakref.finalize(storage, entries.append, (number, -n_bytes))
        return self.names[storage]

    def name(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Says what these tensors are."""
        self.ledger.kinds.update((self.see(t), kind) for t in tensors)


def _in_head() -> bool:
    """Whether the log-prob head is at work, forward or backward."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != head.__file__:
        frame = frame.f_back
    return frame is not None


def _whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _makes_integers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors gives small integers: arange, full, zeros of a whole-number type."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    name = func._overloadpacket.__name__
    return (name == "arange" and all(type(a) is int for a in args)) or (name == "full" and type(args[1]) in (int, bool))


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of matrix products and attention; the others are few beside them."""
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    name = packet.__name__
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if name == "_linear_pointwise":  # oneDNN's x · wᵀ
        return 2 * int(args[0].numel()) * int(args[1].shape[0])
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        query, key = args[:2]
        return 4 * int(query.numel()) * int(key.shape[-2])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        query, key = args[1:3]
        return 10 * int(query.numel()) * int(key.shape[-2])
    return 0


def rehearse(
    make: Callable[[], Any],
    way: Path,
    goal: Goal,
    steps: Sequence[Step],
    optim: Optim,
    *,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
    n_shapes: int = 0,
) -> Ledger:
    """The books of these steps, with what comes before them (check of the paths, reference) and after (evaluation).

    make:   builds the model, with its adapters; called where new tensors are on the device meta.
    way:    the path by which the policy scores.
    n_shapes:  shapes of products for which oneDNN keeps what it prepared; 0: it does not serve this device.
    steps:  micro-batches of each step. The first has no optimizer state yet and the second has, so it takes two to show the
            peak; micro-batches of several sizes show how the heap is fragmented.

    Raises whatever the model's code raises where it needs the values of a tensor.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger = Ledger()
    with torch.device("meta"):  # PEFT moves adapters about, which fake tensors do not allow
        model = make()
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder(ledger, n_shapes) as recorder:
        recorder.phase("load")
        _place(model, device)
        policy = Policy(model, way, autocast=autocast)
        recorder.name("weights", [*policy.parameters(), *policy.buffers()])
        ledger.n_weights = sum(p.numel() for p in policy.parameters())
        ledger.n_trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        _before(recorder, policy, goal, steps)
        _steps(recorder, policy, goal, steps, optim)
    ledger.entries = list(ledger.entries)  # what is collected from here on (a model is a cycle) is no part of the run
    return ledger


def _place(model: nn.Module, device: str) -> None:
    """Gives a model on the device meta its tensors on `device`; what was shared stays shared."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}  # with the old tensor, so that its id stays taken
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, old in owned.items():
                if old is None:
                    continue
                if id(old) not in placed:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    placed[id(old)] = (old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
                owned[name] = placed[id(old)][1]  # type: ignore[assignment]


def _before(recorder: _Recorder, policy: Policy, goal: Goal, steps: Sequence[Step]) -> None:
    """The measured check of the paths scores the longest example by the model's own head; the reference is a forward pass."""
    recorder.phase("check")
    longest = max((tree for step in steps for micro in step for tree in micro), key=lambda t: t.n_tokens)
    definition = Policy(policy.model, Path("rows", "model", alone=True))
    with torch.no_grad():
        definition(definition.pack([longest]))
    Policy(policy.model, policy.path)  # sets the model's attention back
    if any(o.needs_reference for o in goal):
        recorder.phase("reference")
        with torch.inference_mode():
            policy(policy.pack(steps[0][0]))


def _steps(recorder: _Recorder, policy: Policy, goal: Goal, steps: Sequence[Step], optim: Optim) -> None:
    if recorder.prepared:  # a run soon has as many shapes behind it as are held
        for earlier in range(recorder.n_shapes - len(recorder.prepared)):
            recorder.prepare(earlier)
    recorder.phase("update")
    optimizer, watch = make_optimizer(policy, optim), WeightWatch(policy)
    policy.train()
    micros = [[_micro(policy, trees, goal) for trees in step] for step in steps]
    for step in micros:
        recorder.phase("step")
        before = recorder.ledger.flops
        optimizer.zero_grad(set_to_none=True)
        backward(policy, step, goal, n_units=[1] * len(goal))
        recorder.ledger.flops_step = recorder.ledger.flops - before
        recorder.phase("update")
        clip(policy, optim.clip)
        watch.moved()
        optimizer.step()
        recorder.name("gradients", [p.grad for p in policy.parameters() if p.grad is not None])
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim]
    recorder.name("optimizer", moments)
    recorder.phase("evaluation")
    evaluate(policy, micros[0][:1], goal)
    recorder.phase("end")


def _micro(policy: Policy, trees: Sequence[Tree], goal: Goal) -> Micro:
    batch = policy.pack(trees)
    if not any(o.needs_reference for o in goal):
        return Micro(batch, None)
    scores = torch.zeros(len(batch.target), device=next(policy.parameters()).device)
    # responses to other prompts are as long as these, over all
    other = (batch, scores) if any(Mismatched in o.units | o.given for o in goal) else None
    return Micro(batch, scores, mismatched=other)
