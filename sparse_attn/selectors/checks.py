"""Checks of selectors' parameters, each with a message that names the parameter."""

from __future__ import annotations


def check_at_least(name: str, value: int, low: int) -> None:
    """Raises a ValueError unless `value` is an int of at least `low`."""
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raises a ValueError unless `value` is a number in (0, 1]."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def refuse_not_causal(selector: object, is_causal: bool) -> None:
    """Raises a ValueError unless attention is causal."""
    if not is_causal:
        raise ValueError(
            f"{type(selector).__name__} is defined for causal attention, got is_causal=False"
        )
