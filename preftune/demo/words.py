"""Everything that anybody says in the world of the demo: customers' complaints and the desk's sentences.

A complaint is OPENING + SUBJECT + PROBLEM + TAIL; a reply is a row of SENTENCES, each of one kind. The language is closed:
these lists are the grammar that the rubric grades by, the vocabulary of the tokenizer, and the source of every text.
`{item}` stands for one of ITEMS. All is lower case, and the only punctuation is `. , ?`, so that a word is a token.
"""

from __future__ import annotations

# fmt: off
ITEMS: tuple[str, ...] = (
    "kettle", "toaster", "blender", "mixer", "chair", "stool", "shelf", "table",
    "lamp", "lantern", "torch", "candle", "coat", "scarf", "hat", "jacket",
    "clock", "radio", "camera", "speaker", "spade", "hose", "rake", "bucket",
    "towel", "mirror", "sponge", "brush", "suitcase", "tent", "umbrella", "backpack",
    "puzzle", "kite", "doll", "drum", "pen", "stapler", "notebook", "printer",
)
# fmt: on
"""What the store sells."""

PROBLEMS: dict[str, tuple[str, ...]] = {
    "replace": ("arrived broken", "fell apart", "is damaged", "has the wrong color"),
    "trace": ("never arrived", "is very late", "is lost in the mail", "went to the wrong address"),
    "refund": ("was billed twice", "cost more than you said", "was sent back but not paid back", "is on my bill by mistake"),
    "guide": ("came without instructions", "is hard to open", "is hard to clean", "is hard to use"),
}
"""Type of problem, which is also the fix that it needs -> how a customer says it."""

OPENINGS = (
    "",
    "hello,",
    "hi,",
    "hi there,",
    "good morning,",
    "dear team,",
    "i need help.",
    "i have a problem.",
    "something is wrong.",
    "it is me again.",
)
SUBJECTS = ("my {item}", "my new {item}", "the {item} i ordered", "the {item} i bought last week")
TAILS = (
    "",
    "please help.",
    "what can you do?",
    "i want an answer.",
    "i am not happy.",
    "please write back soon.",
    "can you help me?",
    "this is the second time.",
)

UNKNOWN = "something"
"""An ordinary word of the world that also stands for any word that the world does not know."""

SENTENCES: dict[str, tuple[str, ...]] = {
    "greeting_warm": ("thank you for writing.", "good morning, dear customer.", "i am happy to help."),
    "greeting_plain": ("hello.", "hi.", "we have your message."),
    "apology": (
        "we are very sorry.",
        "i am sorry for the trouble.",
        "please accept our apology.",
        "i apologize for this mistake.",
    ),
    "blame": ("it is your fault.", "you were careless with it.", "ugh, how silly of you.", "stop whining."),
    "item": ("this is about your {item}.", "i see the order for your {item}.", "your {item} is on my list."),
    "fix_replace": ("we will send you a new one.", "we will replace it for free."),
    "fix_trace": ("we will trace the parcel.", "we will find it and bring it to you."),
    "fix_refund": ("we will refund you in full.", "we will give you your money back."),
    "fix_guide": ("we will write you a clear guide.", "we will show you how by phone."),
    "no_fix": ("there is nothing we can do.", "wait and see.", "that is not our problem."),
    "filler": ("by the way, it is a nice day here.", "our store is open every day.", "our prices are the best in town."),
    "close_warm": ("have a lovely day.", "we wish you all the best.", "take care, your friends here."),
    "close_plain": ("goodbye.", "that is all."),
    "close_rude": (
        "do not bother us again.",
        "now leave us alone, fool.",
        "enough of this nonsense.",
        "go and annoy another store.",
    ),
}
"""Kind of sentence -> its wordings. A sentence of a reply that is none of these is malformed."""

RUDE_WORDS = frozenset(
    ("ugh", "fool", "fault", "careless", "silly", "whining", "bother", "nonsense", "annoy"),
)
"""Words that stand in rude sentences only, and at least one in each: a rude sentence with a slip in it is rude still."""
