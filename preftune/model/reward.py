"""A reward model: a language model whose head gives one number, as transformers' sequence classification knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from preftune.errors import ModelError
from preftune.model.load import base_of, is_reward_model, load_model, merged_adapter, read_model, without_dropout


def load_reward_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The sequence classifier of a folder, with one output. Raises ModelError for anything else."""
    from transformers import AutoModelForSequenceClassification

    if not is_reward_model(folder):
        raise ModelError(
            f"{folder}: a language model, not a reward model; preftune train loss.name=bradley_terry makes one of it"
        )
    if (folder / "adapter_config.json").exists():
        base = base_of(folder)
        bare = (
            load_reward_model(base, dtype=dtype) if is_reward_model(base) else with_scalar_head(load_model(base, dtype=dtype))
        )
        return merged_adapter(bare, folder)
    model = read_model(AutoModelForSequenceClassification, folder, dtype)
    if model.config.num_labels != 1:
        raise ModelError(f"{folder}: has {model.config.num_labels} outputs; a reward model has one (num_labels=1)")
    return model


def with_scalar_head(model: Any, *, seed: int = 0) -> Any:
    """A sequence classifier with the body of a language model (shared, not copied) and a new head.

    The head's weights are drawn with standard deviation 1/√(width + 1), so that scores begin with a size of about 1 (Stiennon
    et al., 2020, arXiv 2009.01325, appendix B.1). Raises ModelError where transformers has no such class of the architecture.
    """
    from transformers import AutoModelForSequenceClassification

    config = model.config
    config.num_labels = 1
    try:
        with torch.device("meta"):
            scorer = cast(Any, AutoModelForSequenceClassification).from_config(config)
    except ValueError:
        raise ModelError(
            f"transformers has no sequence classification of {config.model_type}, so no reward model of it"
        ) from None
    if not isinstance(getattr(scorer, "score", None), torch.nn.Linear):
        raise ModelError(f"{type(scorer).__name__} has no linear head called score, so no reward model of it can be trained")
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    weight = scorer.score.weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / (weight.shape[1] + 1) ** 0.5
    scorer.score.weight = torch.nn.Parameter(drawn.to(model.base_model.dtype))
    if scorer.score.bias is not None:
        scorer.score.bias = torch.nn.Parameter(torch.zeros(1, dtype=scorer.score.weight.dtype))
    return without_dropout(scorer)


def set_padding(model: Any, tokenizer: Any, *, never: int) -> str:
    """Gives model and tokenizer a padding token that is no response's last: by it the model finds where a response ends.

    `never` is the token that ends a response. Where the tokenizer has no padding token of its own another special token is
    taken, and where it has none, its first token. Returns what was chosen, for the log.
    """
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
    ordinary = tokenizer.convert_ids_to_tokens([0, 1])
    usable = [t for t in (*special, *ordinary) if t is not None and tokenizer.convert_tokens_to_ids(t) != never]
    tokenizer.pad_token = usable[0]
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(usable[0])
    return f"padding token {usable[0]!r}, which ends no response"
