"""The attention function registered with transformers: what each layer's call runs on."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..api import sparse_attention
from ..contract.request import Request
from ..layout import BlockLayout
from ..ops.backends import choose
from ..ops.dense import torch_is_faster
from ..sdpa import scaled_dot_product_attention
from ..selectors import Dense, SlidingWindow
from ..selectors.base import is_dense
from ..typing import SelectorLike
from . import adapters, dense, masks
from .caches import LayerSelectors
from .names import EAGER_NAME, NAME, ROUTERS
from .packing import PACKING, restrict
from .versions import transformers

# Keyword arguments of attention calls that change nothing about the result.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "ignore_index",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)


@dataclass(eq=False)
class Router:
    """Which selector each layer of one patch uses, and how many calls went where.

    `before` holds the configs that the patch changed, each with the implementation that it had
    without any patch. A copy of a patched model holds a copy of the router, whose `before` names
    the copied configs, but no `Patch` that could remove it: it is `orphaned`.
    """

    selector: SelectorLike | dict[int, SelectorLike]
    exclude_layers: frozenset[int] = frozenset()
    backend: str = "auto"
    stats: Counter = field(default_factory=Counter)
    before: list[tuple[Any, str | None]] = field(default_factory=list)
    orphaned: bool = False
    layers: LayerSelectors = field(default_factory=LayerSelectors)

    def __post_init__(self) -> None:
        _routers.add(self)

    def __setstate__(self, state: dict) -> None:
        """Copies and unpickled routers: the process may not know the names yet."""
        self.__dict__.update(state, orphaned=True)
        _routers.add(self)
        register()

    def selector_for(self, layer: int | None) -> SelectorLike:
        """The selector of a full-attention layer: `Dense()` if excluded or not in the dict."""
        if layer in self.exclude_layers:
            return Dense()
        if isinstance(self.selector, dict):
            return Dense() if layer is None else self.selector.get(layer, Dense())
        return self.selector

    def count(self, path: str) -> None:
        """Add a call to `stats`, except in compiled code: it would recompile at every call."""
        if not torch.compiler.is_compiling():
            self.stats[path] += 1


_routers: weakref.WeakSet[Router] = weakref.WeakSet()


def patched_elsewhere(config: Any) -> bool:
    """Whether some patched model uses this config object."""
    return any(config is one for router in _routers for one, _ in router.before)


def register() -> None:
    """Make the names known to transformers."""
    package = transformers()
    functions = {
        NAME: (attention_forward, masks.mask_function),
        EAGER_NAME: (eager_attention_forward, masks.eager_mask_function),
    }
    for name, (attention, mask) in functions.items():
        package.AttentionInterface.register(name, attention)
        package.AttentionMaskInterface.register(name, mask)
    adapters.register(attention_forward)


@dataclass(frozen=True)
class Call:
    """One attention call with the arguments that every way of serving it needs."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    dropout: float
    softcap: float
    sink_logits: Tensor | None
    key_bias: Tensor | None
    eager: bool  # whether the model ran eager attention before

    def part(self, rows: slice, segment: masks.Segment) -> Call:
        """The same for some rows of the batch, and the queries and keys of a segment."""
        queries, keys = segment.queries, segment.keys
        if isinstance(queries, slice) and isinstance(keys, slice):
            sizes = (self.query.shape[0], self.query.shape[2], self.key.shape[2])
            if (rows, queries, keys) == tuple(slice(0, size) for size in sizes):
                return self
        bias = self.key_bias
        if bias is not None:
            bias = bias[rows if bias.shape[0] > 1 else slice(None)][:, :, keys]
        return replace(
            self,
            key_bias=bias,
            query=self.query[rows][:, :, queries],
            key=self.key[rows][:, :, keys],
            value=self.value[rows][:, :, keys],
        )

    @property
    def layer(self) -> int | None:
        return getattr(self.module, "layer_idx", None)

    def refuse(self, what: str, instead: str) -> NoReturn:
        name = type(self.module).__name__
        raise ValueError(f"sparse_attn cannot serve {what} ({name}, layer {self.layer}): {instead}")

    def refuse_argument(self, name: str, why: str) -> NoReturn:
        self.refuse(f"the argument {name!r}", why)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    key_bias: Tensor | None = None,
    eager: bool = False,
    **kwargs,
) -> tuple[Tensor, None]:
    """Serve one attention call of a patched model.

    Args are those of transformers' attention interface: query ``[B, H, Sq, D]``, key and value
    ``[B, Hkv, Skv, D or Dv]``, a mask of `masks.mask_function` or given by the user; `key_bias`
    ``[B or 1, H, Skv]``, of `adapters`, is added to the scores; `eager` is set for models that ran
    eager attention before, whose rows that see no key are the mean of all values, where torch's
    attention makes them 0.

    Returns:
        ``(out [B, Sq, H, Dv], None)``.

    Raises:
        ValueError: for arguments that would have to be ignored, naming them and the layer.
    """
    call = Call(module, query, key, value, scaling, dropout, softcap or 0.0, s_aux, key_bias, eager)
    routers = getattr(module, ROUTERS, ())
    if not routers:
        remedy = (
            "the config of this model names sparse_attn, because a patched model has the same "
            "config object or because it was copied from one; patch this model too, with a config "
            "of its own, or call its set_attn_implementation('sdpa')"
        )
        call.refuse("a layer outside the patched model", remedy)
    router = routers[-1]
    _check_mask(call, attention_mask)
    if masks.is_key_mask(attention_mask):  # only causal masks are told that way
        is_causal = True
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    _check_kwargs(call, kwargs, is_causal)
    if not is_causal:
        router.count("not_causal")
        return dense.explicit(call, attention_mask, window=0, is_causal=False), None
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    attention_mask = restrict(attention_mask, kwargs, sizes, call.refuse_argument)
    visible = masks.read(attention_mask, *sizes)
    if visible is None:
        _check_explicit(call, router, own_window=bool(sliding_window))
        router.count("explicit_mask")
        return dense.explicit(call, attention_mask, window=0, is_causal=True), None
    return _causal(call, router, attention_mask, visible, sliding_window or 0), None


def eager_attention_forward(*args, **kwargs) -> tuple[Tensor, None]:
    """`attention_forward` for models that ran eager attention before."""
    return attention_forward(*args, eager=True, **kwargs)


def _causal(
    call: Call, router: Router, mask: Tensor | None, visible: masks.Visible, sliding_window: int
) -> Tensor:
    """A causal call whose mask is known as segments."""
    window = 0
    if not visible.exact:  # 0 is no window
        both = visible.window and sliding_window
        window = min(visible.window, sliding_window) if both else visible.window or sliding_window
    if sliding_window or visible.window or visible.local:
        path, selector = "window", SlidingWindow(window=window) if window else Dense()
    else:
        selector = router.layers.own(call.module, router.selector_for(call.layer))
        path = "dense" if is_dense(selector) else "sparse"
    if call.dropout and path == "sparse":
        remedy = "set it to 0 in the config, or use Dense()"
        call.refuse(f"attention dropout {call.dropout} with {selector}", remedy)
    router.count(path)
    # A segment's keys are put side by side: in a window that would let in keys from too far back.
    holes_in_window = window and visible.scattered
    if call.dropout or holes_in_window or _torch_is_faster(call, selector, router.backend):
        return dense.explicit(call, mask, window, is_causal=True)
    return _by_segments(call, visible, selector, window, router.backend)


# ----------------------------------------------------------------------------------------- checks


def _check_kwargs(call: Call, kwargs: dict, is_causal: bool) -> None:
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name == "output_attentions":
            call.refuse("output_attentions=True", "no weights are formed; use 'eager' attention")
        if name not in PACKING:
            call.refuse_argument(name, "it may change the result, and nothing here acts on it")
        if not is_causal:
            call.refuse_argument(name, "only causal attention acts on it")


def _check_mask(call: Call, mask: Tensor | None) -> None:
    if mask is None:
        return
    seqlen_q, seqlen_kv = call.query.shape[2], call.key.shape[2]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        call.refuse(f"an attention mask of {shape}", "it must be a 4-D tensor")
    if mask.shape[-1] != seqlen_kv:
        call.refuse(f"an attention mask of {list(mask.shape)}", f"there are {seqlen_kv} keys")
    if masks.is_key_mask(mask):
        return
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        call.refuse(f"an attention mask of {mask.dtype}", "it must be bool or floating point")
    if mask.shape[2] != seqlen_q:
        rows = f"it needs a row for each of {seqlen_q} queries"
        call.refuse(f"an attention mask of {list(mask.shape)}", rows)


def _check_explicit(call: Call, router: Router, own_window: bool) -> None:
    selector = router.selector_for(call.layer)
    if own_window or is_dense(selector):
        return
    remedy = "pass a 2-D padding mask, patch with Dense(), or name the layer in exclude_layers"
    call.refuse(f"an explicit attention mask with {selector}", remedy)


# ----------------------------------------------------------------------- through the library's op


def _by_segments(
    call: Call, visible: masks.Visible, selector: SelectorLike, window: int, backend: str
) -> Tensor:
    """Each segment with its own queries and keys, ``[B, Sq, H, Dv]``."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    everything = (slice(0, batch), slice(0, seqlen_q))
    out = None
    for rows, segments in visible.groups:
        for segment in segments:
            part = call.part(rows, segment)
            if not segment.behind:
                attended = _attend(part, selector, backend)
            elif window or is_dense(selector):
                mask = dense.window_mask(segment, visible.first, window, call.query.device)
                attended = dense.explicit(part, mask, window=0, is_causal=False)
            else:
                attended = _attend_behind(part, selector, backend)
            if isinstance(segment.queries, slice) and (rows, segment.queries) == everything:
                return attended.contiguous()
            if out is None:
                out = attended.new_zeros(batch, seqlen_q, num_heads, call.value.shape[-1])
                seen = torch.zeros(batch, seqlen_q, dtype=torch.bool, device=out.device)
            out[rows, segment.queries] = attended
            seen[rows, segment.queries] = True
    if out is None:
        out = call.query.new_zeros(batch, seqlen_q, num_heads, call.value.shape[-1])
        seen = torch.zeros(batch, seqlen_q, dtype=torch.bool, device=out.device)
    return dense.fill_blind(call, out, seen)


def _attend(call: Call, selector: SelectorLike, backend: str) -> Tensor:
    if backend == "auto" and is_dense(selector) and _is_torchs(call):
        return scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            is_causal=call.query.shape[2] > 1,
            scale=call.scale,
            enable_gqa=True,
        ).transpose(1, 2)
    return sparse_attention(
        call.query,
        call.key,
        call.value,
        selector,
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        key_bias=call.key_bias,
        backend=backend,
    ).transpose(1, 2)


def _is_torchs(call: Call) -> bool:
    """Whether torch's function says the call, and is the quicker one on its CPU."""
    query, key = call.query, call.key
    if dense.beyond_torch(call) or query.device.type != "cpu":
        return False
    return query.shape[2] in (1, key.shape[2]) and torch_is_faster(query, key)


def _attend_behind(call: Call, selector: SelectorLike, backend: str) -> Tensor:
    """Queries that all stand behind the last key: the selector chooses for the last of them.

    To the op they are so many heads of one query.
    """
    query = call.query
    batch, num_heads, rows, head_dim = query.shape

    def choose(_, key: Tensor, **how) -> BlockLayout:
        return selector(query.detach()[:, :, -1:].to(key.dtype), key, **how)

    folded = replace(
        call,
        query=query.reshape(batch, num_heads * rows, 1, head_dim),
        sink_logits=None if call.sink_logits is None else call.sink_logits.repeat_interleave(rows),
    )
    out = _attend(folded, choose, backend)
    return out.reshape(batch, num_heads, rows, -1).transpose(1, 2)


def _torch_is_faster(call: Call, selector: SelectorLike, backend: str) -> bool:
    """Whether dense attention has no compiled kernel, with the choice left to us."""
    if backend != "auto" or not is_dense(selector):
        return False
    if dense.beyond_torch(call):
        return False
    request = Request("attention", call.query, call.key, call.value)
    return choose(backend, request).backend == "reference"
