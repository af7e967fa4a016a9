"""What a module says about a name that it does not have: the nearest one, here or next door."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

# What other libraries call it.
_ELSEWHERE = {
    "flash_attn_func": "sparse_attention",
    "flash_attn_varlen_func": "sparse_attention_varlen",
    "flash_attn_with_kvcache": "sparse_attention_varlen",
    "flex_attention": "sparse_attention",
    "block_sparse_attn_func": "sparse_attention",
    "memory_efficient_attention": "sparse_attention",
    "sdpa": "scaled_dot_product_attention",
    "BlockMask": "BlockLayout",
    "create_block_mask": "BlockLayout",
}


def missing(
    module: str, public: Iterable[str], others: Callable[[], dict[str, str]]
) -> Callable[[str], object]:
    """A module's ``__getattr__``, which raises an AttributeError that names the nearest name.

    Args:
        module: its name.
        public: the names that it has.
        others: names that are reached in another way, and how; asked for when one is missing.
    """

    def __getattr__(name: str) -> object:
        message = f"module {module!r} has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(message)
        known = {x: f"{module}.{x}" for x in public}
        known = {**others(), **known}
        lower = {x.lower(): x for x in known}
        near = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else []
        near = near or [lower[x] for x in get_close_matches(name.lower(), lower, 1, 0.6)]
        hint = f"; do you mean {known[near[0]]}?" if near else ""
        raise AttributeError(message + hint)

    return __getattr__
