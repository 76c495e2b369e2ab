# SPDX-License-Identifier: Apache-2.0
"""Runs on disk: a folder with `config.json`, `vocabulary.json` and `checkpoint.safetensors`.

Each is replaced as a whole: a reader, or the next process after a kill, finds the old file or the
new one. Nothing here can run code from a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gru_fast.errors import InputError
from gru_fast.files import NEW, write_atomically
from gru_fast.language_model import GRULanguageModel
from gru_fast.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Run",
    "claimed",
    "create_run",
    "load_checkpoint",
    "load_run",
    "reopen_run",
    "save_checkpoint",
]

FORMAT = 1
CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
MODEL = "model."

# What config.json holds besides its format; in runs of before `training` has no device.
_TEXT, _WHOLE, _REAL = (str,), (int,), (int, float)
_OPTIONAL = (int, type(None))
_CONTENT: dict[str, dict[str, tuple[type, ...]]] = {
    "model": {
        "vocab_size": _WHOLE, "embedding_size": _OPTIONAL, "hidden_size": _WHOLE,
        "num_layers": _WHOLE, "cell": _TEXT, "dropout": _REAL, "tie_weights": (bool,),
    },
    "corpus": {"source": _TEXT, "mode": _TEXT, "sha256": _TEXT},
    "tokens": {"kind": _TEXT, "max_words": _OPTIONAL},
    "training": {
        "steps": _WHOLE, "batch": _WHOLE, "chunk": _WHOLE, "max_length": _WHOLE, "lr": _REAL,
        "clip": _REAL, "seed": _WHOLE,
    },
}  # fmt: skip


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Keep other processes from training in a folder; a process that is killed lets go of it.

    Makes the folder where there is none.

    Yields:
        Whether they are kept from it: Windows and some file systems know no such locks.

    Raises:
        InputError: Another one has claimed it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder} is a file; choose another --out") from None
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; cannot make that folder") from None
    try:
        import fcntl
    except ModuleNotFoundError:
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; cannot train there") from None
    try:
        alone = False
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                raise InputError(f"{folder}: another process is training there") from None
        yield alone
    finally:
        os.close(descriptor)


def save_checkpoint(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write tensors, and what JSON can hold, to one safetensors file, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    from safetensors.torch import save

    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(content, {"gru_fast": json.dumps({"format": FORMAT, **meta})}))


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: tensors on the CPU, and the rest.

    Raises:
        InputError: The file is missing, damaged, or not a checkpoint of this format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = Path(path).read_bytes()  # safetensors opens paths of UTF-8 only
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        meta = json.loads(header["__metadata__"]["gru_fast"])
        if meta["format"] != FORMAT:
            raise InputError(f"{path}: expected format {FORMAT}, got {meta['format']!r}")
        if type(meta["step"]) is not int:
            raise TypeError("step: expected a number")
        return tensors, meta
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a checkpoint") from None
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is damaged, or no checkpoint of gru_fast; train again, or restore it"
        ) from None


@dataclass(frozen=True)
class Run:
    """A trained model and where it comes from.

    Attributes:
        path: The folder.
        model: The model, in eval mode.
        tokenizer: Its vocabulary.
        config: What `config.json` holds: `model`, `corpus`, `tokens`, `training`, and `changes`,
            the numbers of steps and the devices that were meant before and the step until which
            each held.
        step: Steps trained so far.
    """

    path: Path
    model: GRULanguageModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    step: int

    @property
    def has_eos(self) -> bool:
        """Whether sequences end with EOS: lines do, running text does not."""
        return bool(self.config["corpus"]["mode"] == "lines")


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run.

    Raises:
        InputError: A file is missing or damaged, or they do not fit together.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # Path.is_dir() raises where a name is too long
        raise InputError(f"{folder} is not a folder; expected what `gru-fast train --out` made")
    config = load_config(folder)
    tokenizer = load_tokenizer(folder / VOCABULARY)
    tensors, meta = load_checkpoint(folder / CHECKPOINT)
    try:
        model = GRULanguageModel(**config["model"])
        load_model(model, tensors)
        if model.vocab_size != len(tokenizer):
            raise ValueError("files of different runs")
        return Run(folder, model.eval(), tokenizer, config, meta["step"])
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise InputError(
            f"{folder}: {CONFIG}, {VOCABULARY} and {CHECKPOINT} do not fit together; "
            "train again, or restore them"
        ) from None


def create_run(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, alone: bool) -> None:
    """Write all of a run but the checkpoint, into a folder that this process has claimed.

    Args:
        folder: Empty, or with what is left of a run that came to no checkpoint.
        config: What goes into `config.json`.
        tokenizer: Of the corpus.
        alone: What `claimed` has yielded: where there are no locks, a run without a checkpoint may
            be that of a process which is still on its way to the first.

    Raises:
        InputError: There is something else in the folder, or it cannot be written.
    """
    left = {VOCABULARY, VOCABULARY + NEW, CONFIG + NEW}
    if alone:
        left |= {CONFIG, CHECKPOINT + NEW}
    if {path.name for path in folder.iterdir()} - left:
        raise InputError(f"{folder} is there already; --resume goes on, or choose another --out")
    tokenizer.save(folder / VOCABULARY)
    save_config(folder, config)


def reopen_run(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, str]:
    """Prepare a run to be gone on with; other steps or another device go into `config.json`.

    A vocabulary that is missing or damaged is written again: the corpus has the same digest.

    Args:
        folder: The run's.
        config: As it is now.
        tokenizer: Of the corpus.

    Returns:
        The number of steps done, and a sentence on where it stands.

    Raises:
        InputError: Another file is missing or damaged, `config` is not the run's but for its steps
            and device, `tokenizer` is not the run's, or the run has as many steps already.
    """
    stored = load_config(folder)
    config = json.loads(json.dumps(config))
    # What follows from another is told after it: the vocabulary is the corpus's.
    for part in ("corpus", "tokens", "model", "training"):
        for name, value in config[part].items():
            before = stored[part].get(name)
            # A corpus may have moved: its digest is compared.
            if before == value or name in ("steps", "source", "device"):
                continue
            if name == "sha256":
                raise InputError(
                    f"{config['corpus']['source']} is not the text that {folder} was trained on; "
                    "restore it, or train in another --out"
                )
            named = f"{part} {name} = {before}, now it is {value}"
            if name == "mode":
                named = f"--{before}, now it is --{value}"
            raise InputError(
                f"{folder} was trained with {named}; --resume can change --steps and --device only"
            )
    vocabulary = None
    with contextlib.suppress(InputError):
        vocabulary = load_tokenizer(folder / VOCABULARY)
    if vocabulary is not None and vocabulary.tokens != tokenizer.tokens:
        raise InputError(
            f"{folder / VOCABULARY} is not that of the corpus; restore it, or delete it and it is "
            "written again"
        )
    path = folder / CHECKPOINT
    done = load_checkpoint(path)[1]["step"] if path.exists() else 0
    steps, before = config["training"]["steps"], stored["training"]["steps"]
    status = f"{folder} has {done:,} of {steps:,} steps"
    if steps != before:
        if steps <= done:
            raise InputError(f"{folder} has {done} steps; --steps: expected more, got {steps}")
        stored.setdefault("changes", []).append({"after_step": done, "steps": before})
        status += f", before it was {before:,}"
    elif steps == done:
        status += "; a larger --steps goes on"
    device, before = config["training"]["device"], stored["training"].get("device")
    if before not in (None, device):
        stored.setdefault("changes", []).append({"after_step": done, "device": before})
        status += f"; on {device} from here, before it was {before}: the bits may differ"
    if vocabulary is None:
        tokenizer.save(folder / VOCABULARY)
        status += f"; {VOCABULARY} was missing or damaged, it is written again"
    save_config(folder, {**stored, **config})
    return done, status


def load_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        InputError: It is missing or damaged.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise InputError(f"{path}: expected format {FORMAT}, got {config['format']!r}")
        _check_content(config)
        return dict(config)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a run of gru-fast train") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged; train again, or restore it") from None


def _check_content(config: dict[str, Any]) -> None:
    """Raise what `load_config` makes an `InputError` of unless all is there, of its type."""
    for part, types in _CONTENT.items():
        for name, allowed in types.items():
            if type(config[part][name]) not in allowed:
                raise TypeError(f"{part} {name}: another type")
    if config["corpus"]["mode"] not in ("lines", "text"):
        raise ValueError("corpus mode: neither lines nor text")
    if not isinstance(config["training"].get("device", ""), str):
        raise TypeError("training device: another type")
    if not isinstance(config.get("changes", []), list):
        raise TypeError("changes: another type")


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`.

    Raises:
        InputError: It cannot be written.
    """
    text = json.dumps({"format": FORMAT, **config}, indent=2)  # a path may hold what UTF-8 cannot
    write_atomically(folder / CONFIG, (text + "\n").encode())


def model_tensors(model: GRULanguageModel) -> dict[str, Tensor]:
    """The parameters, each once (a tied one has two names in a state_dict)."""
    return {MODEL + name: parameter for name, parameter in model.named_parameters()}


def load_model(model: GRULanguageModel, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `model_tensors` into a model.

    Raises:
        RuntimeError: Names or shapes differ from the model's.
    """
    state = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    if model.config["tie_weights"] and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
