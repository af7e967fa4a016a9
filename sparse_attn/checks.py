"""Checks of what users pass as numbers and as selectors, each with a message that names the
argument.

An integer may be a Python or a numpy one, or an integer tensor without dimensions; never a bool or
a float. What comes back is Python's own int, float or bool.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1  # the most keys of a sequence, and the most that a layout's tensors can say


def as_int(name: str, value: Any, low: int | None = None, high: int | None = INT32_MAX) -> int:
    """`value` as an int.

    Args:
        name: what messages call it.
        value: what was passed.
        low: the least that is right, or None for no limit.
        high: the greatest that is right, or None for no limit.

    Raises:
        ValueError: if it is no integer, or out of range.
    """
    number = value if type(value) is int else _integer(value)
    if number is None or (low is not None and number < low):
        least = "" if low is None else f" of at least {low}"
        raise ValueError(f"{name} must be an int{least}, got {value!r}")
    if high is not None and number > high:
        shown = "2**31 - 1" if high == INT32_MAX else high
        raise ValueError(f"{name} must be an int of at most {shown}, got {value!r}")
    return number


def as_count(name: str, value: Any, low: int) -> int:
    """The same for numbers of keys, rows or blocks, of which more than any sequence has stand for
    no limit: they become ``2**31 - 1``.
    """
    return min(as_int(name, value, low, None), INT32_MAX)


def as_pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """Two ints, as lengths or the sizes of blocks are given; a tuple comes back as it is."""
    if type(value) is tuple and len(value) == 2:  # of every layout, so at once
        first, second = value
        ints = type(first) is int and type(second) is int
        if ints and low <= first <= INT32_MAX and low <= second <= INT32_MAX:
            return value
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name} must be two ints of at least {low}, got {value!r}")
    first, second = (as_int(f"{name}[{i}]", x, low) for i, x in enumerate(value))
    return first, second


def as_ints(name: str, value: Any, low: int) -> tuple[int, ...]:
    """Ints of at least `low`, any number of them."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} must be a tuple of ints of at least {low}, got {value!r}")
    return tuple(as_int(f"every entry of {name}", x, low) for x in value)


def as_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float in ``[low, high]``.

    Raises:
        ValueError: if it is no real number, NaN, or out of range.
    """
    number = _real(value)
    if number is None or not low <= number <= high:
        must = f"lie in [{low}, {high}]" if high < math.inf else f"be at least {low}"
        must = "be a number" if (low, high) == (-math.inf, math.inf) else must
        raise ValueError(f"{name} must {must}, got {value!r}")
    return number


def as_share(name: str, value: Any) -> float:
    """`value` as a float in (0, 1]."""
    number = _real(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    return number


def as_bool(name: str, value: Any) -> bool:
    """`value` as a bool: Python's, numpy's, or a bool tensor without dimensions."""
    if isinstance(value, Tensor):
        known = value.dtype == torch.bool and value.dim() == 0
    else:
        known = type(value).__name__ in ("bool", "bool_")
    if not known:
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_selector(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` can be called as a selector."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} is the class {value.__name__}: pass an object of it, {value.__name__}(...)"
        )
    if not callable(value):
        raise TypeError(f"{name} must be a selector, got {type(value).__name__}")


# -------------------------------------------- fields of a dataclass, from its __post_init__: they
# are checked and stored anew


def int_fields(owner: object, **lows: int) -> None:
    """The fields named are ints of at least so much, to ``2**31 - 1``."""
    for name, low in lows.items():
        _store(owner, name, as_int, low)


def count_fields(owner: object, **lows: int) -> None:
    """The fields named are counts of at least so much, see `as_count`."""
    for name, low in lows.items():
        _store(owner, name, as_count, low)


def ints_fields(owner: object, **lows: int) -> None:
    """The fields named are tuples of ints of at least so much."""
    for name, low in lows.items():
        _store(owner, name, as_ints, low)


def share_fields(owner: object, *names: str) -> None:
    """The fields named are floats in (0, 1]."""
    for name in names:
        _store(owner, name, as_share)


def number_field(owner: object, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """The field is a float in ``[low, high]``."""
    _store(owner, name, as_number, low, high)


def bool_fields(owner: object, *names: str) -> None:
    """The fields named are bools."""
    for name in names:
        _store(owner, name, as_bool)


def selector_fields(owner: object, *names: str) -> None:
    """The fields named are selectors."""
    for name in names:
        check_selector(name, getattr(owner, name))


def _store(owner: object, name: str, check: Callable, *limits) -> None:
    value = getattr(owner, name)
    checked = check(name, value, *limits)
    if checked is not value:
        object.__setattr__(owner, name, checked)  # the dataclass may be frozen


# ------------------------------------------------------------------------------------------ kinds


def _integer(value: Any) -> int | None:
    """The int that `value` is, or None."""
    if isinstance(value, int | torch.SymInt):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor) and (value.dtype == torch.bool or value.dim() > 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no integer; a tensor without values
        return None


def _real(value: Any) -> float | None:
    """The float that `value` is, or None. A tensor that needs a gradient is none: it would be
    lost.
    """
    if isinstance(value, Tensor):
        real = not (value.is_complex() or value.dtype == torch.bool or value.requires_grad)
        return value.item() * 1.0 if real and value.dim() == 0 and not value.is_meta else None
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)
