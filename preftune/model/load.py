"""A model folder or hub id in, a float32 (or bf16) model and its tokenizer out. Safetensors only, no code from the folder.

    >>> model, tokenizer = load("runs/first")          # a run, a model folder, a LoRA adapter folder, a hub id

What can be wrong with a folder is said before torch reads a byte: no config, no tokenizer, weights only as pickles, an
architecture that wants to run its own code.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from preftune.data.template import Renderer
from preftune.errors import ConfigError, ModelError
from preftune.model.lora import quiet_peft
from preftune.run import Run

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model and the tokenizer that belongs to it."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """The model and tokenizer of a run, a model folder, a LoRA adapter folder (merged on the way in) or a hub id.

    Raises ModelError that says what is missing.
    """
    folder = resolve(path)
    return Loaded(load_model(folder, dtype=dtype).to(device).eval(), load_tokenizer(folder))


def resolve(path: str | Path) -> Path:
    """The folder that `path` stands for: a run's model, a folder, or the local snapshot of a hub id. Raises ModelError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        run = Run(folder)
        if run.config_file.exists():
            if not run.model.is_dir():
                raise ModelError(f"{folder}: this run has no model yet: train it to its end (add --resume)")
            return run.model
        if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{folder}: not a model folder: neither config.json nor adapter_config.json is in it "
                f"(found: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'})"
            )
        return folder
    if folder.exists():
        raise ModelError(f"{folder}: is a file; expected a model folder with config.json and *.safetensors")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ModelError(f"{folder}: no such folder, and not a hub id (owner/name)")
    return _snapshot(str(path))


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name}: no such folder, and the hub did not give it ({type(error).__name__}). "
            "Check the name; a gated model needs HF_TOKEN in the environment"
        ) from None


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model of the folder, all weights in `dtype`, dropout off; an adapter folder is merged into its base."""
    from transformers import AutoModelForCausalLM

    if is_reward_model(folder):
        raise ModelError(f"{folder}: a reward model, which scores responses (preftune judge --by reward) and writes none")
    if (folder / "adapter_config.json").exists():
        return merged_adapter(load_model(base_of(folder), dtype=dtype), folder)
    return read_model(AutoModelForCausalLM, folder, dtype)


def is_reward_model(folder: Path) -> bool:
    """Whether the folder holds a sequence classifier, or an adapter of one, by what its configuration says."""
    if (file := folder / "adapter_config.json").exists():
        return _json_object(file).get("task_type") == "SEQ_CLS"
    named = _json_object(folder / "config.json").get("architectures") or [""]
    return str(named[0]).endswith("ForSequenceClassification")


def read_model(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The folder's weights as an auto class `kind` of transformers reads them, all of them in `dtype`, dropout off.

    Raises ModelError for what cannot be read, and where a weight is not in the files.
    """
    config = _config(folder)
    _check_weights(folder)
    from safetensors import SafetensorError

    try:
        model, report = kind.from_pretrained(
            str(folder), config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the weights could not be loaded: {_first_line(error)}") from None
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: %d tensors have no place in %s and are not used (first: %s)", folder, len(unused),
                    type(model).__name__, ", ".join(unused[:3]))  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights of {type(model).__name__} are not in the safetensors files "
            f"(first: {', '.join(missing[:3])}); they would start at random"
        )
    return without_dropout(model)


def architecture(path: str | Path) -> Any:
    """The configuration of a model without its weights; an adapter has its base's. Raises ModelError."""
    folder = resolve(path)
    return architecture(base_of(folder)) if (folder / "adapter_config.json").exists() else _config(folder)


def unloaded(config: Any, dtype: torch.dtype) -> Any:
    """A model as `load_model` gives it, with the weights that it is born with; inside FakeTensorMode it takes no memory."""
    from transformers import AutoModelForCausalLM

    return without_dropout(cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype))


def merged_adapter(base: Any, folder: Path) -> Any:
    """`base` with the folder's adapter added into its weights. Raises ModelError."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_model.safetensors").exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise ModelError(
            f"{folder}: adapter_model.safetensors is not in it (found: {found}). "
            "An adapter as a pickle could run code when it is read"
        )
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter could not be loaded: {_first_line(error)}") from None


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to. Raises ModelError."""
    file = folder / "adapter_config.json"
    base = _json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{file}: base_model_name_or_path is {base!r}; expected the folder or hub id of the base model")
    return resolve(base)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(written, dict):
        raise ModelError(f"{file}: is a JSON {type(written).__name__}; expected an object")
    return written


def _config(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    written = _json_object(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except StrictDataclassError as error:
        raise ModelError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        if "auto_map" in written:
            raise ModelError(
                f"{folder}: this model wants to run code of its own (auto_map in config.json), which preftune never does. "
                "Use a version whose architecture is part of transformers"
            ) from None
        raise ModelError(
            f"{folder / 'config.json'}: transformers does not know this architecture: {_first_line(error)}"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder}: an encoder-decoder model; preftune aligns decoder-only language models")
    return config


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: the weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read. "
            "Convert them to safetensors first (model.save_pretrained does)"
        )
    raise ModelError(f"{folder}: no *.safetensors in it: the weights are missing")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder. Raises ModelError where there is none."""
    if not any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise ModelError(f"{folder}: no tokenizer in it (tokenizer.json is missing). Copy those of the base model into it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder}: the tokenizer could not be loaded: {_first_line(error)}") from None
    if not len(tokenizer):
        raise ModelError(f"{folder}: the tokenizer is empty: its files are incomplete")
    return tokenizer


def open_renderer(
    path: str | Path, *, template: str | None = None, max_length: int | None = None, usual: int | None = None
) -> Renderer:
    """The tokenizer of a run, folder or hub id with its template: how this model's texts become tokens.

    max_length: longest prompt + response; None: the model's context, at most `usual` tokens if that is given.
    Raises ConfigError for a length beyond the context, ModelError for an unusable tokenizer or template.
    """
    folder = resolve(path)
    context = context_length(folder)
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(f"batch.max_length: {max_length} is longer than the model's context of {context} tokens")
    longest = max_length or min(context or usual or 4096, usual or context or 4096)
    return Renderer(load_tokenizer(folder), template=template, max_length=longest, stop_ids=stop_ids(folder))


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Token ids that end an answer according to the folder's generation config."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return ()
    stop = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    return () if stop is None else tuple(stop) if isinstance(stop, list | tuple) else (int(stop),)


def context_length(folder: Path) -> int | None:
    """Longest sequence that the model's positions cover; None where its configuration states none."""
    if (folder / "adapter_config.json").exists():
        return context_length(base_of(folder))
    length = getattr(_config(folder).get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def check_vocabulary(model: Any, tokenizer: Any, where: object) -> None:
    """Raises ModelError when the tokenizer has ids that the model has no embedding for."""
    rows, ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise ModelError(f"{where}: the tokenizer knows {ids} ids but the model embeds {rows}: they do not belong together")


def quiet_transformers() -> None:
    """Progress bars and advice of the libraries below stay off the terminal; their errors still reach it."""
    from transformers.utils import logging as library

    cast(Any, library).disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def without_dropout(model: Any) -> Any:
    """Policy and reference must be the same function, so a base model's own dropout is off (`lora.dropout` is explicit)."""
    model._preftune_inference_attention = model.config._attn_implementation
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what reaches torch.nn.functional.dropout
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
