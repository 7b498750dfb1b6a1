"""A machine: what its kernels' steps take, as data that can be measured, shipped and sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsify.codegen.target import DTYPES
from sparsify.errors import InputError, nearest
from sparsify.json_keys import each_once
from sparsify.runtime.toolchain import ISAS

VERSION = 2
MOST_CORES = 2**16  # query tiles are handed out to each of them
DECODE_BELOW = 8  # fewer queries than this are a decode step, which waits for memory
# In proportion to the head size, where one size alone is known.
_GROWS = {"full", "masked", "live", "pack", "row", "read", "direct", "pair", "causal", "few", "key"}
CHIPS = ("80", "86", "89", "90", "100", "120", "gfx942")

Cost = float  # nanoseconds of one core, never negative
# Beyond these bounds a prediction would be 0, infinite or no number.
_Cost = Field(ge=0, le=1e12)
_Positive = Field(ge=1e-9, le=1e12)
_Memory = Field(ge=1e6, le=1e18)  # bytes a second
_Seconds = Field(ge=1e-9, le=1e6)
_Size = Field(ge=1, le=2**16)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rates(_Strict):
    """Nanoseconds of one core that a kernel's steps take, for one dtype and head size.

    tile: queries by keys of the tiles that they hold for. full: a pair (row, key) of a full tile. masked: a pair of a
    block that runs with a mask, live: one of those of its keys that are multiplied at all. partial: a row of a partial
    tile, to know what it keeps. visit: a key tile that runs, empty: one that a loop comes to and leaves out. pack: a
    key and its value, copied for many queries. row: a row of a query tile, to start and to store. read: a key and its
    value read where they lie, direct: a pair of such a key and a row. item: a query tile that a core is given, whatever
    is in it.
    """

    dtype: str
    head_dim: int = _Size
    tile: tuple[Annotated[int, _Size], Annotated[int, _Size]]
    full: Cost = _Positive
    masked: Cost = _Cost
    live: Cost = _Cost
    partial: Cost = _Cost
    visit: Cost = _Cost
    empty: Cost = _Cost
    pack: Cost = _Cost
    row: Cost = _Cost
    read: Cost = _Positive
    direct: Cost = _Cost
    item: Cost = _Cost


class Dense(_Strict):
    """Nanoseconds that dense attention (`scaled_dot_product_attention`) takes on the whole machine, for one dtype and
    head size.

    pair: a pair (row, key); causal: one of all pairs under a causal mask, those that it leaves out too. few, key: a
    pair, and a key of each key head, with fewer than 8 queries, as in decoding. launch: a call. cold:
    what one of so few queries takes beside that, as caches then hold what other layers left there.
    """

    dtype: str
    head_dim: int = _Size
    pair: Cost = _Positive
    causal: Cost = _Positive
    few: Cost = _Cost
    key: Cost = _Cost
    launch: Cost = _Cost
    cold: Cost = _Cost


class Selection(_Strict):
    """Nanoseconds of the whole machine that choosing keys takes.

    launch: a choice. product: a product of two elements in scores. score: a score, made, normed and pooled. order: a
    unit's place among those of its row. view: an element of keys and queries that is read for the units' views.
    """

    launch: Cost = _Cost
    product: Cost = _Positive
    score: Cost = _Positive
    order: Cost = _Positive
    view: Cost = _Positive


class Pace(_Strict):
    """How fast a machine runs at a time: its clock and its other users change that by a third from minute to minute.

    product: seconds of a product of two float32 matrices of 512 x 512. memory: of reading 64 MiB that no cache holds.
    """

    product: float = _Seconds
    memory: float = _Seconds


class Machine(_Strict):
    """A processor or GPU. `str(machine)` says which; `machine.text()` is JSON that `Machine.parse` reads.

    name: a short one, in lower case. about: what it is, for people. target: which kernels it runs. arch: their
    instruction set (avx512, avx2, portable), a CUDA capability ("90") or gfx942. cores: of a processor, or
    multiprocessors. memory: bytes a second, all cores together. launch: nanoseconds of a call, whatever it does;
    cold: that a call of fewer than DECODE_BELOW queries takes beside them, as caches then hold what other layers left
    there; fork: that one takes in which more than one core has a part. measured: whether the rates are; if not,
    `sources` says where they are from. pace: how fast it ran then. Rates that can't be 0 are at least 1e-9 ns,
    and memory is read at 1 MB to 1 EB a second.
    """

    version: Literal[2] = VERSION
    name: str = Field(min_length=1)
    about: str
    target: Literal["cpp", "triton"]
    arch: str
    cores: int = Field(ge=1, le=MOST_CORES)
    memory: float = _Memory
    launch: Cost = _Cost
    cold: Cost = _Cost
    fork: Cost = Field(0.0, ge=0, le=1e12)
    measured: bool
    sources: tuple[str, ...] = ()
    rates: tuple[Rates, ...] = Field(min_length=1)
    dense: tuple[Dense, ...] = Field(min_length=1)
    selection: Selection
    pace: Pace | None = None

    @model_validator(mode="after")
    def _known(self) -> Machine:
        archs = tuple(ISAS) if self.target == "cpp" else CHIPS
        if self.arch not in archs:
            raise ValueError(f"arch: found '{self.arch}'; {nearest(self.arch, archs)}")
        for field, entries in (("rates", self.rates), ("dense", self.dense)):
            for entry in entries:
                if entry.dtype not in DTYPES:
                    raise ValueError(f"{field}: found the dtype '{entry.dtype}'; {nearest(entry.dtype, DTYPES)}")
            places = [_place(entry) for entry in entries]
            if twice := next((place for place in places if places.count(place) > 1), None):
                raise ValueError(f"{field}: those of {twice} are given twice")
        return self

    def __str__(self) -> str:
        how = "measured" if self.measured else "not measured"
        return f"{self.name}: {self.about} ({how})"

    def launch_of(self, q_len: int, cores: int) -> Cost:
        """Nanoseconds of a call of so many queries in which so many cores have a part, whatever it does."""
        return self.launch + (self.cold if q_len < DECODE_BELOW else 0.0) + (self.fork if cores > 1 else 0.0)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, where: str = "machine") -> Machine:
        """Reads `text()` back. Raises InputError naming the field; `where` is what the text is of."""
        try:
            data = json.loads(text, object_pairs_hook=each_once)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected an object with the fields of a machine, found {type(data).__name__}")
        found = data.get("version")
        if found != VERSION:
            raise InputError(f"{where}: version: found {found!r}, and this sparsify reads {VERSION}; calibrate it anew")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{where}: {_first(error)}") from None

    def rates_of(self, dtype: str, head_dim: int, tile: tuple[int, int] | None = None) -> Rates:
        """The rates for a dtype and head size, of the nearest tile; those of other sizes from lines through measured
        ones. A dtype that has none takes another's of its width. Raises InputError where there is none of it."""
        found = self._of_dtype("rates", dtype)
        if tile is not None:
            nearest_tile = min({one.tile for one in found}, key=lambda other: _apart(tile, other))
            found = [one for one in found if one.tile == nearest_tile]
        rates = _at_size(found, dtype, head_dim)
        if self.target != "triton":
            return rates
        from sparsify.codegen.triton.tuning import padded

        held = _at_size(found, dtype, padded(head_dim))
        return held.model_copy(update={"head_dim": head_dim, "read": rates.read})

    def dense_of(self, dtype: str, head_dim: int) -> Dense:
        """Dense attention's, in the same way."""
        return _at_size(self._of_dtype("dense", dtype), dtype, head_dim)

    def _of_dtype(self, field: str, dtype: str) -> list[Any]:
        """A field's entries of a dtype, or of another one of its width."""
        entries = getattr(self, field)
        alike = (dtype,) if dtype == "float32" else (dtype, "bfloat16", "float16")
        taken = next((name for name in alike if any(one.dtype == name for one in entries)), None)
        if taken is None:
            has = ", ".join(sorted({one.dtype for one in entries}))
            raise InputError(f"machine {self.name}: {field}: none for {dtype}; it has those of {has}")
        return [one for one in entries if one.dtype == taken]


def _place(entry: Rates | Dense) -> str:
    """What an entry is of, in words."""
    tile = f", tile {entry.tile[0]} x {entry.tile[1]}" if isinstance(entry, Rates) else ""
    return f"{entry.dtype}, head_dim {entry.head_dim}{tile}"


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence."""
    one = error.errors()[0]
    place = ".".join(map(str, one["loc"]))
    if one["type"] == "extra_forbidden":
        fields = _fields_at(one["loc"][:-1])
        return f"{place}: unknown field; {nearest(str(one['loc'][-1]), fields)}"
    if one["type"] == "missing":
        return f"{place}: this field is missing"
    if one["type"] == "value_error":
        return str(one["ctx"]["error"])
    return f"{place}: {one['msg'][0].lower()}{one['msg'][1:]}, found {one['input']!r}"


def _fields_at(place: tuple[Any, ...]) -> Iterable[str]:
    kinds = {"rates": Rates, "dense": Dense, "selection": Selection, "pace": Pace}
    return (kinds[place[0]] if place else Machine).model_fields


def _apart(tile: tuple[int, int], other: tuple[int, int]) -> float:
    return sum(max(a / b, b / a) for a, b in zip(tile, other, strict=True))


def _at_size(found: list[Any], dtype: str, head_dim: int) -> Any:
    """Rates for a head size: on the line through the sizes on either side of it. Beyond all sizes on that through the
    two nearest, kept between the nearest one's rate and that in proportion to the size. Of one size alone in proportion
    for those in _GROWS, else as it is."""
    by_size = {one.head_dim: one for one in found}
    near, *others = sorted(by_size, key=lambda size: abs(size - head_dim))
    # False sorts first: a size on the other side of it, else the next on the same side.
    other = min(others, key=lambda size: (size - head_dim) * (near - head_dim) > 0, default=None)
    inside = min(by_size) <= head_dim <= max(by_size)

    def at(name: str, value: float) -> float:
        grown = value * head_dim / near
        if other is None:
            return grown if name in _GROWS else value
        on_line = value + (getattr(by_size[other], name) - value) / (other - near) * (head_dim - near)
        return on_line if inside else min(max(on_line, min(value, grown)), max(value, grown))

    rates = {name: at(name, value) for name, value in by_size[near] if isinstance(value, float)}
    return by_size[near].model_copy(update=rates | {"dtype": dtype, "head_dim": head_dim})


def read(path: Path) -> Machine:
    """The machine of a file. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    return Machine.parse(text, str(path))
