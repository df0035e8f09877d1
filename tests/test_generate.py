from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from preftune.errors import ConfigError, DataError, ModelError
from preftune.generate import Reply, Sampling, inference_attention, sample, stream

VOCAB = 48


def tiny(kind: str, **changes: Any) -> Any:
    """A random model whose weights are large enough that its distributions are far from uniform."""
    import transformers as tf

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gemma = {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = {
        "llama": lambda: tf.LlamaConfig(**shape | changes),
        "qwen2": lambda: tf.Qwen2Config(**shape | changes),
        "mistral": lambda: tf.MistralConfig(**shape | {"sliding_window": 5} | changes),
        "gemma2": lambda: tf.Gemma2Config(**shape | gemma | {"attn_logit_softcapping": 2.0} | changes),
        "gemma3": lambda: tf.Gemma3TextConfig(**shape | gemma | changes),
        "gpt2": lambda: tf.GPT2Config(
            **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
            | {"bos_token_id": 1, "eos_token_id": 2}
            | changes
        ),
        "mamba": lambda: tf.MambaConfig(
            **{"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
            | changes
        ),
        "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
            **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32}
            | {"num_attention_heads": 4, "attention_window_size": 8}
            | changes
        ),
        "mixtral": lambda: tf.MixtralConfig(**shape | {"num_local_experts": 4} | changes),
    }[kind]()
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def some_prompts(*lengths: int, seed: int = 0) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).astype(np.int32) for n in lengths]


def texts(replies: Sequence[Sequence[Reply]]) -> list[list[list[int]]]:
    return [[r.ids.tolist() for r in group] for group in replies]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


class Fixed(torch.nn.Module):
    """A causal language model whose next token is always distributed as `p`, whatever it reads."""

    def __init__(self, p: Sequence[float]) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(vocab_size=len(p), hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        self.embed = torch.nn.Embedding(len(p), 4)
        self.register_buffer("logits", torch.tensor(p).log())
        self._supports_sdpa = True

    def _can_set_attn_implementation(self) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


# ---- the same as transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "mixtral"])
def test_greedy_equals_transformers_generate(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = tiny(kind), some_prompts(3, 17, 9, 1)
    with caplog.at_level(logging.WARNING, logger="preftune"):
        got = sample(model, prompts, Sampling(temperature=0.0, max_tokens=20), stop_ids={2})
    assert not caplog.records, "these architectures are served with padding and a cache"
    for prompt, [reply] in zip(prompts, got, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        with inference_attention(model):
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=2, pad_token_id=0
            )
        assert reply.ids.tolist() == whole[0, len(prompt) :].tolist()
        assert reply.ended == (whole[0, -1] == 2)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "mamba", "mixtral", "recurrent_gemma"]
)
def test_logp_equals_a_full_forward(kind: str) -> None:
    model, prompts = tiny(kind), some_prompts(4, 13, 8)
    got = sample(model, prompts, Sampling(n=3, temperature=0.7, top_k=20, max_tokens=24), stop_ids={2, 5})
    for prompt, group in zip(prompts, got, strict=True):
        for reply in group:
            ids = torch.tensor(np.concatenate([prompt, reply.ids])[None].astype(np.int64))
            with torch.no_grad(), inference_attention(model):
                logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
            expected = logp[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(reply.logp, expected.numpy(), atol=1e-4)


# ---- what a reply depends on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "mamba"])
def test_a_reply_does_not_depend_on_its_batch(kind: str) -> None:
    model, prompts = tiny(kind), some_prompts(5, 12, 3, 12, 7)
    sampling = Sampling(n=3, max_tokens=18, seed=4)
    together = texts(sample(model, prompts, sampling, stop_ids={2, 3}))
    assert together == texts([sample(model, [p], sampling, stop_ids={2, 3})[0] for p in prompts])
    assert together == texts(sample(model, prompts[::-1], sampling, stop_ids={2, 3}))[::-1]
    assert together == texts(sample(model, prompts, replace(sampling, tokens_per_batch=64), stop_ids={2, 3}))


def test_fewer_samples_and_shorter_replies_are_a_prefix(llama: Any) -> None:
    prompts = some_prompts(5, 9)
    many = sample(llama, prompts, Sampling(n=4, max_tokens=16), stop_ids=())
    few = sample(llama, prompts, Sampling(n=2, max_tokens=6), stop_ids=())
    assert texts(few) == [[r.ids[:6].tolist() for r in group[:2]] for group in many]


def test_seed_sample_and_occurrence_make_the_text(llama: Any) -> None:
    [prompt, other] = some_prompts(6, 6)
    sampling = Sampling(n=2, max_tokens=12, seed=1)
    first = texts(sample(llama, [prompt, other, prompt], sampling, stop_ids=()))
    assert first == texts(sample(llama, [prompt, other, prompt], sampling, stop_ids=()))
    assert first != texts(sample(llama, [prompt, other, prompt], replace(sampling, seed=2), stop_ids=()))
    replies = [tuple(ids) for group in first for ids in group]
    assert len(set(replies)) == len(replies), "samples, prompts and repeated prompts all differ"


def test_samples_share_the_reading_of_the_prompt(llama: Any) -> None:
    sample(llama, some_prompts(3), Sampling(max_tokens=1), stop_ids=())  # measures the architecture: not counted below
    fed: list[tuple[int, ...]] = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sample(llama, some_prompts(30, 20), Sampling(n=5, max_tokens=4), stop_ids=())
    hook.remove()
    assert fed == [(2, 30), (10, 1), (10, 1), (10, 1)]


def test_finished_rows_leave_the_batch() -> None:
    rows: list[int] = []
    model = Fixed([0.9, 0.1])
    sample(model, [np.array([0], np.int32)], Sampling(max_tokens=1), stop_ids=())  # measures the architecture
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    [replies] = sample(model, [np.array([0], np.int32)], Sampling(n=256, max_tokens=40), stop_ids={1})
    going = [sum(len(r.ids) > t for r in replies) for t in range(40)]  # rows that need their token t + 1
    assert rows[0] == 1 and rows[1] == 256 and rows[-1] < 20
    assert all(need <= fed <= need / 0.8 for need, fed in zip(going[1:], rows[1:], strict=True))


# ---- the distribution -------------------------------------------------------------------------------------------------

P = [0.4, 0.3, 0.15, 0.1, 0.05]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"temperature": 2.0}, [p**0.5 for p in P]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": 0.8}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.4, 0.3, 0, 0, 0]),  # 0.7 of the 0.85 that top_k leaves is above 0.8 of it
        ({"temperature": 0.5, "min_p": 0.1}, [0.16, 0.09, 0.0225, 0, 0]),
    ],
)
def test_frequencies_match_the_distribution(changes: dict[str, Any], expected: list[float]) -> None:
    n = 4000
    replies = sample(Fixed(P), [np.array([1], np.int32)], Sampling(n=n // 4, max_tokens=4, seed=3, **changes), stop_ids=())[0]
    count = Counter(int(t) for r in replies for t in r.ids)
    wanted = np.array(expected) / sum(expected) * n
    seen = np.array([count[t] for t in range(5)])
    assert not seen[wanted == 0].any(), "a token that is excluded is never drawn"
    chi_square = ((seen - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand exceeds it
    for reply in replies[:20]:  # whatever was truncated, the log-prob is that of the model
        np.testing.assert_allclose(reply.logp, np.log(np.array(P)[reply.ids]), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 15),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.01, 5),
)
def test_whatever_is_drawn_was_allowed(logits: list[float], top_p: float, top_k: int, min_p: float, temperature: float) -> None:
    p = torch.tensor(logits).double().softmax(-1)
    sampling = Sampling(n=8, max_tokens=2, top_p=top_p, top_k=top_k, min_p=min_p, temperature=temperature)
    replies = sample(Fixed(p.tolist()), [np.array([0], np.int32)], sampling, stop_ids=())[0]
    hot = (p.log() / temperature).softmax(-1)
    for token in {int(t) for r in replies for t in r.ids}:
        likelier = hot[hot > hot[token] * (1 + 1e-4)]
        assert top_k == 0 or len(likelier) < top_k
        assert likelier.sum() <= top_p + 1e-4
        assert hot[token] >= min_p * hot.max() * (1 - 1e-4)


@pytest.mark.parametrize("flat", [False, True])
def test_top_p_of_a_large_vocabulary(flat: bool) -> None:
    p = np.random.default_rng(0).permutation(np.linspace(1, 2, 3000) if flat else 1 / np.arange(1, 3001) ** 2)
    p /= p.sum()
    replies = sample(Fixed(p.tolist()), [np.array([0], np.int32)], Sampling(n=500, max_tokens=8, top_p=0.9), stop_ids=())[0]
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(p[order].cumsum(), 0.9)) + 1]
    drawn = np.concatenate([r.ids for r in replies])
    assert np.isin(drawn, nucleus).all()
    rank = np.argsort(order)[drawn]
    assert rank.max() > 0.9 * len(nucleus) - 1 or not flat, "the whole nucleus is drawn from"
    np.testing.assert_allclose((drawn == nucleus[0]).mean(), p[nucleus[0]] / p[nucleus].sum(), atol=0.03)


def test_greedy_gives_n_equal_replies(llama: Any) -> None:
    [group] = sample(llama, some_prompts(4), Sampling(n=3, temperature=0.0, max_tokens=5), stop_ids=())
    assert len(group) == 3 and len({tuple(r.ids) for r in group}) == 1


# ---- where a reply ends -----------------------------------------------------------------------------------------------


def test_a_reply_ends_with_its_stop_token_or_at_max_tokens(llama: Any) -> None:
    free = sample(llama, some_prompts(5, 8), Sampling(n=6, max_tokens=30), stop_ids=())
    stopped = sample(llama, some_prompts(5, 8), Sampling(n=6, max_tokens=30), stop_ids={7, 9})
    ends = set()
    for whole, cut in zip(sum(free, []), sum(stopped, []), strict=True):
        assert len(whole.ids) == 30 and not whole.ended
        at = np.flatnonzero(np.isin(whole.ids, [7, 9]))
        assert cut.ids.tolist() == whole.ids[: at[0] + 1 if len(at) else None].tolist()
        assert cut.ended == bool(len(at)) and len(cut.logp) == len(cut.ids)
        assert (cut.ids.dtype, cut.logp.dtype) == (np.int32, np.float32)
        ends.add(cut.ended)
    assert ends == {True, False}, "the case tests both"


def test_the_context_bounds_a_reply() -> None:
    model = tiny("gpt2", n_positions=12)
    replies = sample(model, some_prompts(11, 4, 9), Sampling(n=2, max_tokens=30), stop_ids=())
    assert [[len(r.ids) for r in group] for group in replies] == [[1, 1], [8, 8], [3, 3]]
    assert not any(r.ended for group in replies for r in group)


def test_progress_counts_replies(llama: Any) -> None:
    seen: list[tuple[int, int]] = []
    sampling = Sampling(n=2, max_tokens=3, tokens_per_batch=40)
    sample(llama, some_prompts(9, 8, 7, 6), sampling, stop_ids=(), on_progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen[-1] == (8, 8) and [d for d, _ in seen] == sorted({d for d, _ in seen})


# ---- what the caller has is left as it was ----------------------------------------------------------------------------


def test_training_flags_and_attention_are_restored(llama: Any) -> None:
    model = tiny("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()  # a part that somebody froze on purpose
    flags = {name: m.training for name, m in model.named_modules()}
    model.set_attn_implementation("eager")
    used = set()
    model.register_forward_pre_hook(lambda m, _: used.add((m.training, m.config._attn_implementation)))
    sampled = texts(sample(model, some_prompts(5), Sampling(max_tokens=8), stop_ids=()))
    assert used == {(False, "sdpa")}
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert model.config._attn_implementation == "eager"
    assert sampled == texts(sample(llama, some_prompts(5), Sampling(max_tokens=8), stop_ids=())), "no dropout in it"
    model._preftune_inference_attention = "eager"
    used.clear()
    sample(model, some_prompts(5), Sampling(max_tokens=2), stop_ids=())
    assert used == {(False, "eager")}


def test_restored_after_an_error() -> None:
    model = tiny("llama").train()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        sample(model, some_prompts(5), Sampling(max_tokens=4), stop_ids=())
    assert model.training and model.config._attn_implementation == "eager"


def test_softcapped_attention_is_never_sdpa() -> None:
    model = tiny("gemma2")
    with inference_attention(model):
        assert model.config._attn_implementation == "eager"


def test_weights_train_after_sampling() -> None:
    model = tiny("llama").train()
    sample(model, some_prompts(5), Sampling(max_tokens=4), stop_ids=())
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_a_peft_model_samples_with_its_adapter(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = texts(sample(llama, some_prompts(5, 9), Sampling(max_tokens=12), stop_ids=()))
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = texts(sample(model, some_prompts(5, 9), Sampling(max_tokens=12), stop_ids=()))
    with model.disable_adapter():
        assert texts(sample(model, some_prompts(5, 9), Sampling(max_tokens=12), stop_ids=())) == plain
    assert adapted == texts(sample(model.merge_and_unload(), some_prompts(5, 9), Sampling(max_tokens=12), stop_ids=()))
    assert adapted != plain


# ---- architectures that padding or a cache does not suit --------------------------------------------------------------


def test_a_model_that_ignores_padding_is_measured_and_served_without(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    forward = type(model).forward
    model.forward = lambda input_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0: forward(
        model, input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
    )
    prompts, sampling = some_prompts(3, 8, 5, 8), Sampling(n=2, max_tokens=10)
    with caplog.at_level(logging.WARNING, logger="preftune"):
        got = sample(model, prompts, sampling, stop_ids=())
    assert len(caplog.records) == 1 and "log-probs differ" in caplog.text
    assert texts(got) == texts(sample(tiny("llama"), prompts, sampling, stop_ids=()))


def test_state_that_does_not_follow_its_rows_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("recurrent_gemma")  # keeps state in its modules, where no selection of rows reaches it
    with caplog.at_level(logging.WARNING, logger="preftune"):
        together = sample(model, some_prompts(6, 4), Sampling(n=3, max_tokens=10), stop_ids=())
    assert len(caplog.records) == 2
    assert texts(together) == texts(
        [sample(model, [p], Sampling(n=3, max_tokens=10), stop_ids=())[0] for p in some_prompts(6, 4)]
    )


def test_a_model_whose_cache_is_wrong_is_served_without(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    forward = type(model).forward
    model.forward = lambda input_ids=None, attention_mask=None, position_ids=None: forward(
        model, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
    )
    prompts, sampling = some_prompts(3, 8, 5, 8), Sampling(n=2, max_tokens=10)
    with caplog.at_level(logging.WARNING, logger="preftune"):
        got = sample(model, prompts, sampling, stop_ids=())
    assert len(caplog.records) == 2
    assert texts(got) == texts(sample(tiny("llama"), prompts, sampling, stop_ids=()))


def test_longrope_past_its_first_context_equals_a_full_forward(caplog: pytest.LogCaptureFixture) -> None:
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny("llama", rope_parameters={**factors, "original_max_position_embeddings": 16})
    with caplog.at_level(logging.WARNING, logger="preftune"):
        [prompt], [[reply]] = (
            some_prompts(10),
            sample(model, some_prompts(10), Sampling(temperature=0.0, max_tokens=20), stop_ids=()),
        )
    assert "without a cache" in caplog.text
    for t in range(20):
        ids = torch.tensor(np.concatenate([prompt, reply.ids[:t]])[None].astype(np.int64))
        with torch.no_grad():
            assert model(input_ids=ids).logits[0, -1].argmax() == reply.ids[t]


# ---- mistakes ---------------------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_answered_are_all_named(llama: Any) -> None:
    bad = [*some_prompts(5), np.zeros(0, np.int32), *some_prompts(96), np.array([1, VOCAB], np.int32), *some_prompts(95)]
    with pytest.raises(DataError) as error:
        sample(llama, bad, Sampling(max_tokens=2), stop_ids=())
    said = str(error.value)
    assert "prompt 1 is empty" in said and "prompt 2 has 96 tokens" in said and "holds 96" in said
    assert f"prompt 3 has token ids 1…{VOCAB}" in said and "prompt 0" not in said and "prompt 4" not in said
    with pytest.raises(DataError, match="prompt 0 is empty"):
        list(stream(llama, np.zeros(0, np.int32), Sampling(), stop_ids=(), decode=str))
    assert sample(llama, [], Sampling(), stop_ids=()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_tokens": 0},
        {"tokens_per_batch": -1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ConfigError, match=f"{name}=.*expected"):
        Sampling(**wrong)


# ---- stream -----------------------------------------------------------------------------------------------------------


def as_bytes(ids: Sequence[int]) -> str:
    """A byte-level vocabulary: tokens 3 … 47 are the bytes of multi-byte characters and of letters."""
    alphabet = b"abc " + "é€😀ü".encode()
    return bytes(alphabet[i % len(alphabet)] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("seed", range(6))
def test_stream_equals_sample(llama: Any, seed: int) -> None:
    [prompt], sampling = some_prompts(7), Sampling(max_tokens=40, seed=seed)
    [[reply]] = sample(llama, [prompt], sampling, stop_ids={11, 12})
    pieces = list(stream(llama, prompt, sampling, stop_ids={11, 12}, decode=as_bytes))
    assert "".join(pieces) == as_bytes(reply.ids[:-1] if reply.ended else reply.ids)
    assert all(pieces)


def test_stream_holds_back_half_a_character() -> None:
    euro = dict(enumerate("€".encode()))
    model = Fixed([0.98, 0.01, 0.01])
    pieces = stream(
        model,
        np.array([0], np.int32),
        Sampling(temperature=0.0, max_tokens=7),
        stop_ids={2},
        decode=lambda ids: bytes(euro[n % 3] for n in range(len(ids))).decode(errors="replace"),
    )
    assert list(pieces) == ["€", "€", "\N{REPLACEMENT CHARACTER}"]


def test_a_closed_stream_gives_the_model_back() -> None:
    model = tiny("llama").train()
    pieces = stream(model, some_prompts(4)[0], Sampling(max_tokens=20), stop_ids=(), decode=lambda ids: "x" * len(ids))
    assert next(pieces) == "x"
    assert not torch.is_inference_mode_enabled(), "what the caller does between two pieces is its own affair"
    pieces.close()
    assert model.training
