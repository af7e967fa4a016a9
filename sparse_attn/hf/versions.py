"""Which transformers `patch` needs."""

from __future__ import annotations

OLDEST_TRANSFORMERS = "5.14"  # older ones tell the masks of static caches in another way


def transformers():
    """The package, if it is new enough; it is imported no earlier than this is called."""
    needed = f"sparse_attn.patch needs transformers {OLDEST_TRANSFORMERS} or later"
    remedy = f"pip install 'transformers>={OLDEST_TRANSFORMERS}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{needed}: {remedy}") from error
    if _release(transformers.__version__) < _release(OLDEST_TRANSFORMERS):
        raise ImportError(f"{needed}, and {transformers.__version__} is installed: {remedy}")
    return transformers


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
