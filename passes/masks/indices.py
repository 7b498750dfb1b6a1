"""How the elements of a view, gather, concatenation or constant follow from those of its inputs.

A rule gets the node and the index of the wanted element, one expression per dimension of the node's result, and
gives that element. Sizes are those of the traced (fake) tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sparsify.expr import Expr, as_expr, conjunction, constant, eq, select
from sparsify.passes.masks.values import Element, Opaque, as_int, pick
from sparsify.walk import loads, variables

if TYPE_CHECKING:
    from sparsify.passes.masks.elements import Elements

Index = tuple[Expr, ...]
Rule = Callable[["Elements", fx.Node, Index], Element]
ZERO = as_expr(0)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def unsqueeze(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = argument(node, 1, "dim") % len(index)
    return el.at(node.args[0], index[:dim] + index[dim + 1 :])


def squeeze(el: Elements, node: fx.Node, index: Index) -> Element:
    sizes = el.shape(node.args[0])
    dims = argument(node, 1, "dim", list(range(len(sizes))))
    dims = {dim % len(sizes) for dim in ([dims] if isinstance(dims, int) else dims)}
    ones = [i in dims and isinstance(size, int) and size == 1 for i, size in enumerate(sizes)]
    rest = iter(index)
    return el.at(node.args[0], tuple(ZERO if one else next(rest) for one in ones))


def same(el: Elements, node: fx.Node, index: Index) -> Element:
    """Copies, casts and expansions: the input's element, broadcast."""
    return el.broadcast(node.args[0], node, index)


def source(el: Elements, node: fx.Node, index: Index) -> Element:
    """x.copy_(y) and x.expand_as(y) differ in which of the two they show; this is the second."""
    return el.broadcast(node.args[1], node, index)


def reshape(el: Elements, node: fx.Node, index: Index) -> Element:
    old, new = ([el.size(s) for s in el.shape(x)] for x in (node.args[0], node))
    return el.at(node.args[0], tuple(regrouped(el, old, new, index)))


def regrouped(el: Elements, old: list[Expr], new: list[Expr], index: Index) -> list[Expr]:
    """The index into a tensor of sizes `old` of the element that has `index` when it is seen in sizes `new`.

    Sizes are matched from the left in groups of equal product; within a group the flat position decides.
    """
    found: list[Expr] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            found.append(index[j])
            i, j = i + 1, j + 1
        elif j < len(new) and constant(new[j]) == 1:
            j += 1
        elif i < len(old) and constant(old[i]) == 1:
            found.append(ZERO)
            i += 1
        else:
            first, last = _group(old, i, new, j)
            found += _delinear(el, _linear(index[j:last], new[j:last]), old[i:first])
            i, j = first, last
    return found


def _group(old: list[Expr], i: int, new: list[Expr], j: int) -> tuple[int, int]:
    """The ends of the shortest runs old[i:], new[j:] with equal products."""
    if i >= len(old) or j >= len(new):
        raise Opaque("a reshape whose sizes don't match up")
    many, few, i, j = old[i], new[j], i + 1, j + 1
    while many != few:
        if i < len(old) and (j >= len(new) or _smaller(many, few)):
            many, i = many * old[i], i + 1
        elif j < len(new):
            few, j = few * new[j], j + 1
        else:
            raise Opaque("a reshape whose sizes don't match up")
    return i, j


def _smaller(a: Expr, b: Expr) -> bool:
    """By value, or for symbolic products by their length as text."""
    x, y = constant(a), constant(b)
    return x < y if x is not None and y is not None else len(str(a)) < len(str(b))


def _linear(index: Sequence[Expr], sizes: Sequence[Expr]) -> Expr:
    total = ZERO
    for i, size in zip(index, sizes, strict=True):
        total = total * size + i
    return total


def _delinear(el: Elements, linear: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    found = []
    for size in reversed(sizes[1:]):
        found.append(el.box.mod(linear, size))
        linear = el.box.floordiv(linear, size)
    return [linear, *reversed(found)] if sizes else []


def permute(el: Elements, node: fx.Node, index: Index) -> Element:
    found = list(index)
    for i, dim in enumerate(argument(node, 1, "dims")):
        found[dim % len(index)] = index[i]
    return el.at(node.args[0], tuple(found))


def transpose(el: Elements, node: fx.Node, index: Index) -> Element:
    a, b = (node.args[1], node.args[2]) if len(node.args) == 3 else (-1, -2)
    found = list(index)
    if len(found) > 1:
        found[a], found[b] = found[b], found[a]  # type: ignore[index]
    return el.at(node.args[0], tuple(found))


def slice_(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = argument(node, 1, "dim", 0) % len(index)
    size = el.size(el.shape(node.args[0])[dim])
    start = wrapped(el, argument(node, 2, "start") or 0, size)
    step = el.scalar(argument(node, 4, "step", 1))
    return el.at(node.args[0], _with(index, dim, start + index[dim] * step))


def wrapped(el: Elements, value: Any, size: Expr) -> Expr:
    """A position that may count from the end."""
    start = el.scalar(value)
    number = value.meta.get("val") if isinstance(value, fx.Node) else value
    if el.box.at_least(start, 0) or guard_or_false(number >= 0):  # a guard on the length: no mask slices both ways
        return start
    if el.box.at_least(-start, 1):
        found = start + size
        return found if el.box.at_least(found, 0) else select(found >= 0, found, 0)
    raise Opaque(f"a position that may be negative ({start})")


def _with(index: Index, dim: int, value: Expr) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def narrow(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = node.args[1] % len(index)  # type: ignore[operator]
    start = wrapped(el, node.args[2], el.size(el.shape(node.args[0])[dim]))
    return el.at(node.args[0], _with(index, dim, index[dim] + start))


def select_(el: Elements, node: fx.Node, index: Index) -> Element:
    sizes = el.shape(node.args[0])
    dim = node.args[1] % len(sizes)  # type: ignore[operator]
    return el.at(node.args[0], (*index[:dim], wrapped(el, node.args[2], el.size(sizes[dim])), *index[dim:]))


def flip(el: Elements, node: fx.Node, index: Index) -> Element:
    sizes, found = el.shape(node), list(index)
    for dim in argument(node, 1, "dims"):
        found[dim] = el.size(sizes[dim]) - 1 - index[dim]
    return el.at(node.args[0], tuple(found))


def roll(el: Elements, node: fx.Node, index: Index) -> Element:
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims") or ([0] if len(index) == 1 else None)
    if dims is None:
        raise Opaque("a roll over all dimensions at once")
    sizes, found = el.shape(node), list(index)
    for shift, dim in zip(as_list(shifts), as_list(dims), strict=True):
        found[dim] = el.box.mod(found[dim] - el.scalar(shift), el.size(sizes[dim]))
    return el.at(node.args[0], tuple(found))


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def repeat(el: Elements, node: fx.Node, index: Index) -> Element:
    sizes = el.shape(node.args[0])
    kept = index[len(index) - len(sizes) :]
    return el.at(node.args[0], tuple(el.box.mod(i, el.size(size)) for i, size in zip(kept, sizes, strict=True)))


def repeat_interleave(el: Elements, node: fx.Node, index: Index) -> Element:
    dim, times = argument(node, 2, "dim"), el.scalar(argument(node, 1, "repeats"))
    if dim is None and len(index) > 1:
        raise Opaque("a repeat_interleave over all dimensions at once")
    dim = (dim or 0) % len(index)
    return el.at(node.args[0], _with(index, dim, el.box.floordiv(index[dim], times)))


def cat(el: Elements, node: fx.Node, index: Index) -> Element:
    return concatenated(el, node.args[0], argument(node, 1, "dim", 0) % len(index), index)  # type: ignore[arg-type]


def concatenated(el: Elements, parts: Sequence[Any], dim: int, index: Index) -> Element:
    """The element of tensors laid end to end; each is asked beyond its end, too, where a choice then discards it."""
    end, pieces = ZERO, []
    for part in parts:
        if not _is_empty(el.shape(part)):
            start, end = end, end + el.size(el.shape(part)[dim])
            with el.beyond():
                pieces.append((end, el.at(part, _with(index, dim, index[dim] - start))))
    result = pieces[-1][1]
    for end, piece in reversed(pieces[:-1]):
        result = pick(el.box.decide(index[dim] < end), piece, result)
    return result


def diff(el: Elements, node: fx.Node, index: Index) -> Element:
    times, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1) % len(index)
    parts = [x for x in (argument(node, 3, "prepend"), node.args[0], argument(node, 4, "append")) if x is not None]
    if times != 1 or el.is_bool(node) or el.is_float(node):
        raise Opaque("a repeated or non-integer diff")
    after = concatenated(el, parts, dim, _with(index, dim, index[dim] + 1))
    return as_int(after) - as_int(concatenated(el, parts, dim, index))


def cumsum(el: Elements, node: fx.Node, index: Index) -> Element:
    """Of what doesn't change along the dimension (the packed-sequence number of positions that count up by one)."""
    if el.is_float(node) or el.is_float(node.args[0]):
        raise Opaque("a cumsum of floating numbers")
    dim = node.args[1] % len(index)  # type: ignore[operator]
    along = el.fresh(node, el.shape(node)[dim])
    element = as_int(el.at(node.args[0], _with(index, dim, along)))
    if variables(along) & variables(element):
        raise Opaque("cumsum")
    return element * (index[dim] + 1)


def _is_empty(shape: tuple[Any, ...]) -> bool:
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


def stack(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = argument(node, 1, "dim", 0) % len(index)
    pieces = [el.at(part, index[:dim] + index[dim + 1 :]) for part in node.args[0]]  # type: ignore[union-attr]
    result = pieces[-1]
    for i, piece in reversed(list(enumerate(pieces[:-1]))):
        result = pick(el.box.decide(eq(index[dim], i)), piece, result)
    return result


def pad(el: Elements, node: fx.Node, index: Index) -> Element:
    pads, sizes = argument(node, 1, "pad"), el.shape(node.args[0])
    found, inside = list(index), []
    for i in range(0, len(pads), 2):
        dim = len(index) - 1 - i // 2
        found[dim] = index[dim] - el.scalar(pads[i])
        inside += [found[dim] >= 0, found[dim] < el.size(sizes[dim])]
    named = el.name(node) == "pad"  # pad(x, pad, mode, value) and constant_pad_nd(x, pad, value)
    if named and argument(node, 2, "mode", "constant") != "constant":
        raise Opaque("a pad that repeats the tensor")
    value = el.cast(el.constant(argument(node, 3 if named else 2, "value") or 0), node)
    with el.beyond():
        element = el.at(node.args[0], tuple(found))
    return pick(el.box.decide(conjunction(inside)), element, value)


def index_tensor(el: Elements, node: fx.Node, index: Index) -> Element:
    base, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    given = [i for i, entry in enumerate(indices) if entry is not None]
    if any(el.is_bool(indices[i]) for i in given):
        raise Opaque("an index by a boolean tensor")
    rank = max(len(el.shape(indices[i])) for i in given)
    adjacent = given == list(range(given[0], given[-1] + 1))
    at = given[0] if adjacent else 0
    shared, rest = index[at : at + rank], iter(index[:at] + index[at + rank :])
    sizes = el.shape(base)
    found = []
    for i, size in enumerate(sizes):
        if i in given:
            entry = el.at_shared(indices[i], shared, el.shape(node)[at : at + rank])
            found.append(gathered(el, entry, el.size(size), index))
        else:
            found.append(next(rest))
    return el.at(base, tuple(found))


def gathered(el: Elements, entry: Element, size: Expr, index: Index) -> Expr:
    """An index read from a tensor: torch counts a negative one from the end."""
    entry = as_int(entry)
    if loads(entry) and not (el.is_large(index) and el.is_small(entry)):
        raise Opaque("an index that is itself data")  # the gathered tensor is then the smaller load
    return entry if el.box.at_least(entry, 0) else select(entry >= 0, entry, entry + size)


def index_select(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = node.args[1] % len(index)  # type: ignore[operator]
    size = el.size(el.shape(node.args[0])[dim])
    return el.at(node.args[0], _with(index, dim, gathered(el, el.at(node.args[2], (index[dim],)), size, index)))


def gather(el: Elements, node: fx.Node, index: Index) -> Element:
    dim = node.args[1] % len(index)  # type: ignore[operator]
    size = el.size(el.shape(node.args[0])[dim])
    return el.at(node.args[0], _with(index, dim, gathered(el, el.at(node.args[2], index), size, index)))


def triangle(keeps_lower: bool) -> Rule:
    """tril (True) and triu (False)."""

    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        gap = index[-1] - index[-2] - el.scalar(argument(node, 1, "diagonal", 0))
        kept = el.box.decide(gap <= 0 if keeps_lower else gap >= 0)
        return pick(kept, el.at(node.args[0], index), el.cast(el.constant(0), node))

    return rule


def arange(el: Elements, node: fx.Node, index: Index) -> Element:
    start, step = (node.args[0] if len(node.args) > 1 else 0), argument(node, 2, "step", 1)
    if el.is_float(node):
        raise Opaque("a floating-point arange")
    return el.scalar(start) + index[0] * el.scalar(step)


def eye(el: Elements, node: fx.Node, index: Index) -> Element:
    return el.cast(el.box.decide(eq(index[0], index[1])), node)


def filled(position: int | None, value: Any = None, name: str = "fill_value") -> Rule:
    """A constant tensor: `value`, or the argument at a position."""

    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        found = value if position is None else argument(node, position, name)
        return el.at(found, ()) if isinstance(found, fx.Node) else el.constant(found)

    return rule


def getitem(el: Elements, node: fx.Node, index: Index) -> Element:
    """One of the results of split, chunk, unbind, meshgrid or broadcast_tensors."""
    producer, which = node.args
    assert isinstance(producer, fx.Node) and isinstance(which, int)
    name = el.name(producer)
    base = producer.args[0]
    if name == "meshgrid":
        i = 1 - which if which < 2 and argument(producer, 1, "indexing", "ij") == "xy" else which
        return el.at(base[which], (index[i],) if el.shape(base[which]) else ())  # type: ignore[index]
    if name == "broadcast_tensors":
        return el.broadcast(base[which], node, index)  # type: ignore[index]
    if name == "unbind":
        dim = argument(producer, 1, "dim", 0) % (len(index) + 1)
        return el.at(base, (*index[:dim], as_expr(which), *index[dim:]))
    if name not in ("split", "chunk", "split_with_sizes"):
        raise Opaque(name)
    dim = argument(producer, 2, "dim", 0) % len(index)
    before = [entry.shape[dim] for entry in producer.meta["val"][:which]]
    start = sum((el.size(size) for size in before), start=ZERO)
    return el.at(base, _with(index, dim, index[dim] + start))


INDEX_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("expand", "expand_as", "broadcast_to", "clone", "contiguous", "alias", "detach", "to", "lift", "lift_fresh",
         "lift_fresh_copy", "_to_copy", "type_as", "positive"), same,
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "_reshape_alias"), reshape),
    "copy": source, "unsqueeze": unsqueeze, "squeeze": squeeze, "permute": permute,
    **dict.fromkeys(("transpose", "t", "mT", "swapaxes", "swapdims"), transpose),
    "slice": slice_, "narrow": narrow, "select": select_, "flip": flip, "roll": roll, "repeat": repeat, "tile": repeat,
    "repeat_interleave": repeat_interleave, "cat": cat, "concat": cat, "stack": stack, "constant_pad_nd": pad,
    "pad": pad,
    "diff": diff, "cumsum": cumsum, "index": index_tensor, "index_select": index_select, "gather": gather,
    "tril": triangle(True), "triu": triangle(False), "arange": arange, "eye": eye, "getitem": getitem,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), filled(None, 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), filled(None, 1)),
    "full": filled(1), "full_like": filled(1), "new_full": filled(2), "scalar_tensor": filled(0, name="s"),
    "fill": filled(1, name="value"),
}  # fmt: skip

__all__ = ["INDEX_RULES", "Index", "Rule", "argument"]
