"""Where the DiT's parameters stand in checkpoints: ours are fused, theirs are one for each product."""

# Our parts of a block -> checkpoint names; a tuple is split evenly along the output features.
CHECKPOINT_NAMES = {
    "self_attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "self_attention.out": ("attn1.to_out.0",),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attention.out": ("attn2.to_out.0",),
    "ff.0": ("ff.net.0.proj",),
    "ff.2": ("ff.net.2",),
}
TOP_NAMES = {
    "patch_embed": "pos_embed.proj",
    "time_embed.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_embed.modulation": "adaln_single.linear",
    "text_embed.0": "caption_projection.linear_1",
    "text_embed.2": "caption_projection.linear_2",
}


def checkpoint_place(name: str) -> tuple[str, tuple[str, ...], str]:
    """Our parameter name -> (block prefix, checkpoint names of its parts, ".weight", ".bias" or "")."""
    module, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return "", (name,), ""
    if module.startswith("transformer_blocks."):
        prefix = ".".join(module.split(".")[:2]) + "."
        part = module.removeprefix(prefix)
        return prefix, CHECKPOINT_NAMES.get(part, (part,)), dot + kind
    return "", (TOP_NAMES.get(module, module),), dot + kind
