"""Checks of what `plan` is called with, so that nothing wrong comes up deep inside."""

from __future__ import annotations

import contextlib
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import InputError
from sparsify.planner.readings import Readings
from sparsify.planner.samples import Tokenizer

MEASURES = ("unit", "absolute", "reference", "distance", "loss", "probes")  # what an `Objective` has


def check_model(model: Any, objective: Any, tokenizer: Any, state: Any, name: Any) -> None:
    """Raises InputError for an argument of another kind than `plan` takes."""
    if not callable(model):
        raise _kind("model", "a model that can be called", model)
    if objective is not None and not all(hasattr(objective, field) for field in MEASURES):
        raise _kind("objective", f"an object with {', '.join(MEASURES)}", objective)
    if not isinstance(tokenizer, Tokenizer | None):
        raise _kind("tokenizer", "a planner.samples.Tokenizer", tokenizer)
    if not isinstance(state, str | Path | None):
        raise _kind("state", "the path of a folder", state)
    if not isinstance(name, str):
        raise _kind("name", "text", name)


def check_inputs(model: Any, readings: Readings) -> None:
    """Raises InputError for samples with an input that the model's forward doesn't take."""
    model = getattr(model, "_orig_mod", model)
    try:
        parameters = signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return  # of something without a signature: a run says what it takes
    open_ended = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
    main = getattr(model, "main_input_name", None)  # transformers' forwards take anything beside their own inputs
    for name in readings.profile[0].inputs:
        if name not in parameters and not (open_ended and main in (None, name)):
            reads = main or ", ".join(parameters)
            raise InputError(
                f"plan: model: {type(model).__name__} takes no '{name}', it reads {reads}; "
                "give Readings with samples of its own inputs as data"
            )


def check_tokens(model: Any, readings: Readings) -> None:
    """Raises InputError for a token that is beyond the model's vocabulary, where that is known."""
    size = vocabulary_of(model)
    for sample in (one for part in vars(readings).values() for one in part if size is not None):
        tokens = sample.inputs.get("input_ids")
        if not isinstance(tokens, torch.Tensor) or not tokens.numel():
            continue
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= size:
            found = least if least < 0 else most
            raise InputError(f"plan: data: found the token {found}; the model's vocabulary is 0-{size - 1}")


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model knows: by its embedding of them, else by its config; None where neither says so."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        size = model.get_input_embeddings().num_embeddings
        if isinstance(size, int):
            return size
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _kind(name: str, expected: str, found: Any) -> InputError:
    return InputError(f"plan: {name}: expected {expected}, found {type(found).__name__}")
