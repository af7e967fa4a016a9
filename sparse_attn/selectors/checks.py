"""Checks of selectors' parameters and calls, each with a message that names the parameter."""

from __future__ import annotations

from ..checks import (
    as_count,
    as_int,
    bool_fields,
    check_selector,
    count_fields,
    int_fields,
    ints_fields,
    number_field,
    selector_fields,
    share_fields,
)

__all__ = [
    "as_count",
    "as_int",
    "bool_fields",
    "check_at_least",
    "check_selector",
    "count_fields",
    "int_fields",
    "ints_fields",
    "number_field",
    "refuse_not_causal",
    "selector_fields",
    "share_fields",
]


def check_at_least(name: str, value: int, low: int) -> None:
    """Raises a ValueError unless `value` is an int of at least `low`, at most ``2**31 - 1``."""
    as_int(name, value, low)


def refuse_not_causal(selector: object, is_causal: bool) -> None:
    """Raises a ValueError unless attention is causal."""
    if not is_causal:
        raise ValueError(
            f"{type(selector).__name__} is defined for causal attention, got is_causal=False"
        )
