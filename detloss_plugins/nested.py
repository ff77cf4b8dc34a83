"""Tensors in nested tuples and dicts, and the same in one flat list."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


def flatten(value: Any) -> tuple[list[Tensor], Hashable]:
    """The tensors of nested tuples, lists and dicts, and what :func:`unflatten` puts them back by."""
    flat: list[Tensor] = []
    return flat, _place(value, flat)


def _place(value, flat):
    """Append the tensors to ``flat``. A closure that calls itself would keep them until the garbage collector comes."""
    if isinstance(value, Tensor):
        flat.append(value)
        return len(flat) - 1
    if isinstance(value, dict):
        return dict, tuple((name, _place(v, flat)) for name, v in value.items())
    return (tuple, tuple(_place(v, flat) for v in value)) if isinstance(value, (tuple, list)) else None


def unflatten(structure: Any, flat: tuple[Tensor, ...] | list[Tensor]) -> Any:
    """Nested tuples and dicts of the tensors in ``flat``, and None for whatever was none."""
    if structure is None or isinstance(structure, int):
        return None if structure is None else flat[structure]
    kind, parts = structure
    if kind is dict:
        return {name: unflatten(part, flat) for name, part in parts}
    return tuple(unflatten(part, flat) for part in parts)


def each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested dicts, lists and tuples with ``function`` of every tensor in its place, and all else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: each_tensor(function, part) for name, part in value.items()}
    kind = list if isinstance(value, list) else tuple
    return kind(each_tensor(function, part) for part in value) if isinstance(value, (list, tuple)) else value
