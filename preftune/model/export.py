"""The result as an ordinary Hugging Face folder: safetensors, tokenizer with its chat template, generation config."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.files import storage, sync_folder
from preftune.model.lora import autocast_of, is_lora, plain, uncast_frozen


def save_model(model: Any, tokenizer: Any, folder: Path, *, chat_template: str | None = None, merge: bool = False) -> None:
    """Writes the whole folder or leaves the old one. A LoRA model is saved as PEFT's adapter, or merged with `merge`.

    chat_template: the template that the run used, when it is not the tokenizer's own; it is saved with the tokenizer.
    Raises StorageError.
    """
    with storage(folder, "save the model"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            os.chmod(temporary, 0o755)
            result = merged(model) if merge and is_lora(model) else model
            with _any_generation_config(result, temporary):
                result.save_pretrained(str(temporary))
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's card says nothing of this run: the report's does
            if chat_template is not None:
                tokenizer.chat_template = chat_template
            tokenizer.save_pretrained(str(temporary))
            replace_folder(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _clear_up(folder: Path) -> None:
    """Removes what a crash left beside `folder`; where it struck between two renames, the old folder is put back."""
    for stale in folder.parent.glob(f".{folder.name}.*"):
        if not folder.exists() and (stale / folder.name).is_dir():
            os.replace(stale / folder.name, folder)
        shutil.rmtree(stale)


@contextmanager
def _any_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Keeps a generation config that contradicts itself, as published models have them: transformers refuses to save it."""
    base = plain(model)
    if not hasattr(base, "generation_config"):  # a reward model writes nothing
        yield
        return
    own = base.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        base.generation_config = type(own)()
    try:
        yield
    finally:
        changed, base.generation_config = base.generation_config is not own, own
    file = folder / "generation_config.json"
    if changed and file.exists():
        file.write_text(own.to_json_string())


def merged(model: Any) -> Any:
    """A copy of a LoRA model with the adapters added into its weights; `model` itself stays as it is."""
    import copy

    twin = copy.deepcopy(model)
    if autocast_of(twin):
        uncast_frozen(twin)
    return twin.merge_and_unload()


def replace_folder(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`, every file synced first; a crash leaves one of the two whole."""
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(new)
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        try:
            os.replace(target, old / target.name)
            try:
                os.replace(new, target)
            except BaseException:
                os.replace(old / target.name, target)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(new, target)
    sync_folder(target.parent)
