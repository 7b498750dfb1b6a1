"""Models that a command line names: a Hugging Face config, a model type, or a callable of the user's."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsify.errors import InputError, SparsifyError, nearest

LARGE = 6 * 2**30  # bytes of weights that may be made up
MAPPINGS = (  # what a model type without `architectures` is made as: the first of these that knows its config
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_MAPPING",
)  # fmt: skip
# What configs take beside the fields that they show: those that transformers reads into others.
OLD_FIELDS = {"num_labels", "partial_rotary_factor", "rope_scaling", "rope_theta", "torch_dtype"}


@dataclass(frozen=True)
class Wanted:
    """What the command line says of a Hugging Face model and its inputs.

    command: who asks, for errors. drawn: whether weights and inputs are drawn at random, else they are whatever.
    """

    length: int = 512
    batch: int = 1
    dtype: str | None = None
    attn: str = "sdpa"
    padding: bool = False
    decode: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    command: str = "explain"
    drawn: bool = False


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a model, its arguments and keyword arguments


def overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`num_hidden_layers=4` and the like as config fields: JSON values, or text. Raises InputError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"--set: expected NAME=VALUE, such as num_hidden_layers=4, found '{text}'")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def called(name: str, wanted: Wanted) -> Call:
    """What the user's package.module:callable gives: a model, (model, inputs) or (model, args, kwargs)."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{wanted.command}: '{name}' can't be imported: {error}") from None
    found = function()
    if not isinstance(found, tuple):
        if getattr(found, "main_input_name", None) is None:
            raise InputError(f"{wanted.command}: {name}() must return (model, inputs), found {type(found).__name__}")
        return found, (), _inputs(found, wanted)
    if len(found) not in (2, 3):
        raise InputError(f"{wanted.command}: {name}() must return (model, inputs), found {len(found)} values")
    made, given, *rest = found
    if isinstance(given, Mapping):
        return made, (), dict(given)
    return made, tuple(given) if isinstance(given, tuple | list) else (given,), dict(rest[0]) if rest else {}


def of_config(name: str, wanted: Wanted, use: Callable[..., Any]) -> Any:
    """What `use` makes of a Hugging Face model and its inputs, which are fake where the model's code allows it.

    Raises InputError for what can't be made or run.
    """
    from torch._subclasses import fake_tensor

    by_value = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    try:
        with fake_tensor.FakeTensorMode():
            return use(*from_config(name, wanted))
    except by_value:
        pass  # the model's code looks at values: it has to run
    except SparsifyError:
        raise
    except Exception as error:
        raise _unusable(name, error, wanted) from error
    check_size(name, wanted, "its code looks at values, and")
    try:
        return use(*from_config(name, wanted))
    except SparsifyError:
        raise
    except Exception as error:
        raise _unusable(name, error, wanted) from error


def loaded(name: str, wanted: Wanted) -> tuple[Any, Any]:
    """A Hugging Face model of a folder with its weights, in evaluation mode, and its tokenizer, None if it has none.

    Nothing is downloaded. Raises InputError for a folder without weights, and for what transformers can't load.
    """
    transformers = _transformers(wanted)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        what = "is no folder with a config.json and weights, and no package.module:callable"
        raise InputError(f"{wanted.command}: '{name}' {what}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{wanted.command}: {name}: the folder has no weights (*.safetensors)")
    config = _config(transformers, name, wanted)
    try:
        kind = _class(transformers, config)
        made = kind.from_pretrained(
            name, config=config, local_files_only=True, attn_implementation=wanted.attn, dtype=wanted.dtype or "auto"
        ).eval()
        known = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
        return made, transformers.AutoTokenizer.from_pretrained(name, local_files_only=True) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{wanted.command}: {name}: transformers can't load this model: {_line(error)}") from None


def check_size(name: str, wanted: Wanted, why: str) -> None:
    """Raises InputError, which begins with `why`, for a model whose weights are too many to make them up."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        size = sum(parameter.nbytes for parameter in _made(name, replace(wanted, drawn=False)).parameters())
    if size > LARGE:
        what = f"{why} {size / 2**30:.0f} GiB of weights are too many to run it"
        raise InputError(f"{wanted.command}: {name}: {what}; make it smaller: --set num_hidden_layers=2")


def token_bytes(name: str, wanted: Wanted) -> int:
    """Bytes that a token takes, at the least, in a Hugging Face model of a config: its number, and its hidden state,
    keys and values of one layer; 0 in a model that reads no tokens. Raises InputError for an unknown config."""
    config = _config(_transformers(wanted), name, wanted).get_text_config()

    def size(field: str, other: int) -> int:
        found = getattr(config, field, None)  # some have one for each layer
        return found if isinstance(found, int) else other

    if not size("vocab_size", 0):
        return 0
    hidden, heads = size("hidden_size", 0), size("num_attention_heads", 0)
    cached = 2 * size("num_key_value_heads", heads) * size("head_dim", hidden // max(1, heads))
    return 8 + (4 if wanted.dtype == "float32" else 2) * (hidden + cached)


def _unusable(name: str, error: Exception, wanted: Wanted) -> InputError:
    hint = "give it with inputs of your own as package.module:callable"
    return InputError(f"{wanted.command}: {name}: the model can't be run on made-up inputs: {_line(error)}; {hint}")


def from_config(name: str, wanted: Wanted) -> Call:
    """A Hugging Face model of a config (file, folder or model type) and inputs for it; see `of_config`."""
    made = _made(name, wanted)
    return made, (), _inputs(made, wanted)


def _transformers(wanted: Wanted) -> Any:
    for noisy in ("torch.utils._pytree", "torchao"):  # transformers imports torchao, which warns of itself
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers
    except ImportError:
        what = "a Hugging Face model needs transformers: pip install 'sparsify[demo]'"
        raise InputError(f"{wanted.command}: {what}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _made(name: str, wanted: Wanted) -> Any:
    transformers = _transformers(wanted)
    from transformers.initialization import no_init_weights

    config = _config(transformers, name, wanted)
    config._attn_implementation = wanted.attn
    try:
        with _weights(no_init_weights, wanted), _dtype(wanted.dtype or getattr(config, "dtype", None)):
            return _class(transformers, config)._from_config(config).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{wanted.command}: {name}: transformers can't make this model: {_line(error)}") from None


def _weights(no_init_weights: Callable[[], Any], wanted: Wanted) -> Any:
    if not wanted.drawn:
        return no_init_weights()
    import torch

    torch.manual_seed(0)
    return contextlib.nullcontext()


def _config(transformers: Any, name: str, wanted: Wanted) -> Any:
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    types = transformers.CONFIG_MAPPING
    try:
        if file.is_file():
            read = partial(transformers.AutoConfig.from_pretrained, file.parent, local_files_only=True)
        elif name in types:
            read = partial(transformers.AutoConfig.for_model, name)
        else:
            raise _unknown(name, types, wanted)
        if wanted.overrides:
            _check_fields(read(), wanted)
        return read(**wanted.overrides)
    except SparsifyError:
        raise
    except Exception as error:  # a config's own checks raise a class of their own
        raise InputError(f"{wanted.command}: {name}: transformers can't make this model: {_line(error)}") from None


def _check_fields(config: Any, wanted: Wanted) -> None:
    """Raises InputError for an override that is no field of the config, which transformers would ignore."""
    names = {*config.to_dict(), *vars(config), *config.attribute_map}
    fields = {name for name in names if not name.startswith("_")}
    for name in wanted.overrides:
        if name not in fields | OLD_FIELDS:
            what = f"unknown field '{name}' of {config.model_type}'s config"
            raise InputError(f"{wanted.command}: --set: {what}; {nearest(name, fields)}")


def _unknown(name: str, types: Any, wanted: Wanted) -> InputError:
    """What is wrong with a name that is no config and no model type."""
    path = Path(name)
    if path.is_dir():
        return InputError(f"{wanted.command}: the folder '{name}' has no config.json")
    if os.sep in name or path.suffix == ".json":
        hint = "give a config.json, a folder with one, or a model type of transformers (nothing is downloaded)"
        return InputError(f"{wanted.command}: there is no file '{name}'; {hint}")
    what = "is no config.json, no folder with one, no package.module:callable and no model type of transformers"
    return InputError(f"{wanted.command}: '{name}' {what}; {nearest(name, types) if len(name) < 40 else ''}")


def _class(transformers: Any, config: Any) -> Any:
    """The class that the config names, else the fullest one that transformers has for its type."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if named is not None:
        return named
    for mapping in MAPPINGS:
        known = getattr(transformers, mapping)
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"no class for {type(config).__name__}")


def _inputs(made: Any, wanted: Wanted) -> dict[str, Any]:
    given = _zeros(made, wanted)
    return {name: _drawn(made, value) for name, value in given.items()} if wanted.drawn else given


def _zeros(made: Any, wanted: Wanted) -> dict[str, Any]:
    """Inputs of the sizes that were asked for; without --padding no mask is given, since a user may give none."""
    import torch

    config, name = made.config, made.main_input_name
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = vision.image_size if isinstance(vision.image_size, list | tuple) else (vision.image_size,) * 2
        return {name: torch.zeros(wanted.batch, getattr(vision, "num_channels", 3), *side, dtype=made.dtype)}
    tokens = torch.zeros(wanted.batch, wanted.length, dtype=torch.long)
    if name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        features = torch.zeros(wanted.batch, config.num_mel_bins, frames, dtype=made.dtype)
        given = {name: features, "decoder_input_ids": tokens}
        return decoding(made, given, wanted) if wanted.decode else given
    if name != "input_ids":
        raise InputError(f"{wanted.command}: {type(made).__name__} reads {name}; give it as package.module:callable")
    given = {"input_ids": tokens}
    if wanted.padding:
        given["attention_mask"] = torch.ones_like(tokens)
        given["attention_mask"][: (wanted.batch + 1) // 2, : wanted.length // 2] = 0
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens
    return decoding(made, given, wanted) if wanted.decode else given


def _drawn(made: Any, like: Any) -> Any:
    """Tokens or numbers at random, for an input without padding."""
    import torch

    generator = torch.Generator().manual_seed(1)
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator).to(like.dtype)
    return torch.randint(1, made.config.get_text_config().vocab_size, like.shape, generator=generator)


def decoding(made: Any, given: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """The last token of the inputs, with a cache of all before it. Raises InputError for a model without a cache."""
    import torch

    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    tokens = given[name]
    before = given | {name: tokens[:, :-1]}
    if "attention_mask" in given and name == "input_ids":
        before["attention_mask"] = given["attention_mask"][:, :-1]
    with torch.no_grad():
        out = made(**before, use_cache=True)
    if getattr(out, "past_key_values", None) is None:
        raise InputError(f"{wanted.command}: {type(made).__name__} keeps no cache, so it has no decode step")
    given = given | {name: tokens[:, -1:], "past_key_values": out.past_key_values, "use_cache": True}
    if name == "decoder_input_ids":
        del given[made.main_input_name]
        given["encoder_outputs"] = (out.encoder_last_hidden_state,)
    return given


@contextlib.contextmanager
def _dtype(dtype: Any) -> Iterator[None]:
    """New parameters in this dtype, if it is one."""
    import torch

    before = torch.get_default_dtype()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _line(error: Exception) -> str:
    """What an error says in one line: its first, and those that it announces with a colon."""
    said, *rest = (str(error).strip() or type(error).__name__).splitlines()
    while rest and said.endswith(":"):
        said = f"{said} {rest.pop(0).strip()}".strip()
    return said
