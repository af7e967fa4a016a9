"""Names that a patch leaves on models and configs."""

# Registered with transformers: for models whose own dense masks are bool, and additive ones.
NAME = "sparse_attn"
EAGER_NAME = "sparse_attn_eager"
ROUTERS = "_sparse_attn_routers"  # on each module of a patched model: its patches, innermost last
