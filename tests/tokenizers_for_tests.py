"""Tokenizers trained here and now, and chat templates of the shapes that published models have.

`byte_level` is of the GPT-2, Llama-3 and Qwen kind, `metaspace` of the sentencepiece kind, with the space that it puts before a
text. `FAMILIES` names ready pairs of tokenizer and template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Where is the nearest harbour, and when does the last ferry leave from there?",
    "The last ferry leaves at nine. Please be there ten minutes early!",
    "My kettle arrived broken. What can you do about it, and how soon?",
    "I am sorry about the kettle. We will send you a new one, and you keep the old one.",
    "Human: Hello\n\nAssistant: Hello. How can I help you today?\n\nHuman: Not at all.\n\nAssistant: Very well.\n",
    "user\nassistant\nsystem\nmodel\nYou answer in short sentences.\n\n[INST] and [/INST] <think>\n\n</think>\n\n",
    "for i in range(10):\n    print(i)\n\n\n* one\n* two\n  * three",
] * 4


def byte_level(
    *, special: Sequence[str] = ("<|end|>",), bos: str | None = None, eos: str | None = "<|end|>", pad: str | None = None,
    adds_bos: bool = False, template: str | None = None, vocab: int = 420,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Byte-level BPE; with `adds_bos`, BOS is put before every text."""
    return _wrap(_byte_level(tuple(special), bos if adds_bos else None, vocab), bos, eos, pad, template)


def metaspace(
    *, special: Sequence[str] = ("<s>", "</s>"), bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = None,
    adds_bos: bool = True, scheme: str = "always", template: str | None = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """BPE with ▁ for a space and one before the text ("always": also after each special token), bytes for what it lacks."""
    return _wrap(_metaspace(tuple(special), bos if adds_bos else None, scheme), bos, eos, pad, template)


def _wrap(backend: str, bos: str | None, eos: str | None, pad: str | None, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), bos_token=bos, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _byte_level(special: tuple[str, ...], adds: str | None, vocab: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(special), initial_alphabet=alphabet), adds)
    return str(tokenizer.to_str())


@cache
def _metaspace(special: tuple[str, ...], adds: str | None, scheme: str) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":  # as converted Llama-2 files have it: the space is written before the text is split
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_of_text = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *special, *bytes_of_text])
    _train(tokenizer, trainer, adds)
    state = json.loads(tokenizer.to_str())  # the trainer knows one way to put the bytes in; they are no special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_of_text]
    return json.dumps(state)


def _train(tokenizer: Tokenizer, trainer: object, adds: str | None) -> None:
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds is not None:
        id_of = tokenizer.token_to_id(adds)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{adds} $A", special_tokens=[(adds, id_of)])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Nothing is trimmed, no BOS; a line break follows the end of turn."""

HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header|>' + m['role'] + '<|/header|>\\n\\n' + (m['content'] | trim) + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"
)
"""Of the Llama-3 kind: BOS, role headers, trimmed content, an end of turn that is not EOS."""

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ (m['content'] | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Of the Gemma kind: no system role, turns must alternate."""

INST = (
    "{{ bos_token }}{% set start = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for m in messages[start:] %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\\n\\n' if start and loop.last else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Of the Mistral kind: no header for a reply, a space before it, the system text folded into the last user's turn."""

THINKS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|a|>' + m['content'].split('</think>')[-1].lstrip() + '<|eos|>' }}"
    "{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|><think>\\n' }}{% endif %}"
)
"""The prompt opens a thought, which a finished turn does not show."""

EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The last reply gets an empty thought, which is gone once another turn follows: history is rewritten."""

FORGETS = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\\n' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
"""No special token at all."""


def _chatml() -> PreTrainedTokenizerFast:
    return byte_level(special=("<|im_start|>", "<|im_end|>", "<|end|>"), eos="<|im_end|>", pad="<|end|>", template=CHATML)


def _headers() -> PreTrainedTokenizerFast:
    special = ("<|begin|>", "<|end|>", "<|header|>", "<|/header|>", "<|eot|>")
    return byte_level(special=special, bos="<|begin|>", eos="<|end|>", adds_bos=True, template=HEADERS)


def _no_system() -> PreTrainedTokenizerFast:
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    return metaspace(special=special, bos="<bos>", eos="<eos>", pad="<pad>", scheme="never", template=NO_SYSTEM)


def _inst() -> PreTrainedTokenizerFast:
    return metaspace(scheme="first", pad="</s>", template=INST)


def _inst_legacy() -> PreTrainedTokenizerFast:
    return metaspace(scheme="always", template=INST)


def _inst_normalizer() -> PreTrainedTokenizerFast:
    return metaspace(scheme="normalizer", template=INST)


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": _chatml,
    "headers": _headers,
    "no_system": _no_system,
    "inst": _inst,
    "inst_legacy": _inst_legacy,
    "inst_normalizer": _inst_normalizer,
    "plain": lambda: byte_level(),
    "plain_metaspace": lambda: metaspace(scheme="first"),
}
"""Tokenizers by family; those called plain have no template of their own."""
