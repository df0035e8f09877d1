"""The demo's world: a support desk whose complaints and replies are generated from a seed.

    >>> world = World(seed=0)
    >>> demonstrations = world.demonstrations(6000)      # prompt + one reply, of very mixed quality: what SFT imitates
    >>> complaints = world.prompts(800, split="train")   # never about an item of `world.held_out`
    >>> unseen = world.prompts(256, split="eval")        # only about those

Demonstrations speak of all items, so a model trained on them knows every word; preferences speak of the train items alone,
so an evaluation on the held-out ones shows whether *manners and method* were learnt, rather than answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from preftune.data.types import Example, Message, content_id
from preftune.demo.rubric import words
from preftune.demo.words import ITEMS, OPENINGS, PROBLEMS, SENTENCES, SUBJECTS, TAILS, UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

N_HELD_OUT = 8

# What an agent of this desk is like: kinds of sentence with their weights, "" for none. The desk is bad at its job: nine of ten
# replies are rude somewhere, one in three offers the right fix, and hardly any does everything right.
GREETING = {"greeting_warm": 30, "greeting_plain": 70}
ATTITUDE = {"apology": 28, "blame": 56, "": 16}
ITEM = {"right": 58, "wrong": 14, "": 28}
FIX = {"right": 33, "wrong": 22, "no_fix": 45}
FILLER = {"filler": 50, "": 50}
CLOSE = {"close_warm": 15, "close_plain": 12, "close_rude": 73}

BOS, END, PAD, USER, AGENT = "<start>", "<end>", "<pad>", "<user>", "<agent>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<agent>{{ message.content }}<end>"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant, not ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<agent>{% endif %}"
)


class World:
    """The support desk. Everything it says follows from the seed; asking for more only lengthens a list."""

    def __init__(self, seed: int = 0) -> None:
        """`seed` also chooses which items are held out."""
        self.seed = seed
        self.held_out: frozenset[str] = frozenset(self._rng("split").sample(ITEMS, N_HELD_OUT))
        """Items that no preference speaks of."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that can occur, sorted; punctuation marks are words."""
        texts = [text for texts in (*PROBLEMS.values(), *SENTENCES.values()) for text in texts]
        texts += [*OPENINGS, *SUBJECTS, *TAILS]
        return tuple(sorted({*ITEMS, *(word for text in texts for word in words(text.replace("{item}", "")))}))

    def demonstrations(self, n: int) -> list[Example]:
        """`n` different complaints about any item, each with one reply."""
        rng = self._rng("demonstrations")
        found: dict[str, Example] = {}
        while len(found) < n:
            item, fix, text = _complaint(rng, ITEMS)
            named = _named(rng, item, self._items("eval" if item in self.held_out else "train"))
            prompt, reply = (Message("user", text),), _reply(rng, named, fix)
            found.setdefault(text, Example(content_id(prompt, reply), prompt, (reply,), f"world[{len(found)}]"))
        return list(found.values())

    def prompts(self, n: int, *, split: Literal["train", "eval"] = "train") -> list[Example]:
        """`n` different complaints without a reply: about the held-out items in "eval", about all others in "train"."""
        rng = self._rng(f"prompts/{split}")
        items = self._items(split)
        found: dict[str, Example] = {}
        while len(found) < n:
            _, _, text = _complaint(rng, items)
            prompt = (Message("user", text),)
            found.setdefault(text, Example(content_id(prompt), prompt, (), f"world/{split}[{len(found)}]", split))
        return list(found.values())

    def speaks_of_held_out(self, text: str) -> bool:
        """Whether a text names a held-out item: a sampled reply may, by a slip, and is then no matter for a preference."""
        return not self.held_out.isdisjoint(words(text))

    def _items(self, split: Literal["train", "eval"]) -> list[str]:
        return [item for item in ITEMS if (item in self.held_out) == (split == "eval")]

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"preftune world {self.seed} {purpose}")


def best_reply(item: str, fix: str, *, wording: int = 0) -> str:
    """A reply that earns the highest reward to a complaint about `item` that needs `fix`."""
    kinds = ("greeting_warm", "apology", "item", f"fix_{fix}", "close_warm")
    said = [SENTENCES[kind][wording % len(SENTENCES[kind])] for kind in kinds]
    return " ".join(said).replace("{item}", item)


def _complaint(rng: random.Random, items: Sequence[str]) -> tuple[str, str, str]:
    """An item, the fix that its problem needs, and what the customer says."""
    item, fix = rng.choice(items), rng.choice(tuple(PROBLEMS))
    clause = f"{rng.choice(SUBJECTS).format(item=item)} {rng.choice(PROBLEMS[fix])}."
    return item, fix, " ".join(part for part in (rng.choice(OPENINGS), clause, rng.choice(TAILS)) if part)


def _named(rng: random.Random, item: str, items: Sequence[str]) -> str:
    """The item that the reply names, or "": mostly the customer's, sometimes another of `items`.

    Agents mix up items of one side of the split only, so that hardly any sampled reply brings a held-out item to a preference.
    """
    named = _draw(rng, ITEM)
    return rng.choice([other for other in items if other != item]) if named == "wrong" else item if named else ""


def _reply(rng: random.Random, named: str, fix: str) -> str:
    """What one of the desk's agents answers: a sentence of each kind or none, in an order that varies a little."""
    offered = _draw(rng, FIX)
    if offered == "wrong":
        fix = rng.choice([other for other in PROBLEMS if other != fix])
    middle = [_draw(rng, ATTITUDE), "item" if named else "", "no_fix" if offered == "no_fix" else f"fix_{fix}"]
    if rng.random() < 0.3:
        middle[:2] = middle[1::-1]
    middle.insert(rng.choice((2, 3)), _draw(rng, FILLER))
    kinds = [_draw(rng, GREETING), *middle, _draw(rng, CLOSE)]
    return " ".join(rng.choice(SENTENCES[kind]) for kind in kinds if kind).replace("{item}", named)


def _draw(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def build_tokenizer(vocabulary: Sequence[str], path: Path | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word of `vocabulary` and five special tokens, and no id besides; saved to `path` if given.

    Special: `<start>` (BOS), `<end>` (EOS, ends a reply), `<pad>`, `<user>` and `<agent>` (begin a turn). Text in, text out:
    decoding puts no space before punctuation. A word that the vocabulary lacks is read as the word UNKNOWN, which must be
    in it: an extra id for such words would be one that no training ever touches, and alignment could promote it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (PAD, BOS, END, USER, AGENT)
    ids = {token: at for at, token in enumerate((*special, *vocabulary))}
    if UNKNOWN not in ids:
        raise ValueError(f"the vocabulary lacks {UNKNOWN!r}, which stands for unknown words")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("!", ".")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins by spaces, none before punctuation
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, AGENT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    if path is not None:
        fast.save_pretrained(path)
    return fast
