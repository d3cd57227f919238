"""A KV cache of bytes, where the engine was told one: its dtype, and a scale a head for keys and for values.

append_kv(k, v); y = paged_attention(q)
->   append_kv(k, v; layer.k_scale, layer.v_scale); y = paged_attention(q; layer.k_scale, layer.v_scale)

Where the checkpoint has them, rope_append_kv also takes offsets of the keys, which attention need not know.
"""

from __future__ import annotations

from dataclasses import replace

from fastkernels.compiler.graph import Graph, Node, WeightSpec


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Of a layer's keys and values, as checkpoints call them."""
    return f"model.layers.{layer}.self_attn.k_scale", f"model.layers.{layer}.self_attn.v_scale"


def key_offset_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.k_offset"


def quantize_kv(graph: Graph) -> Graph:
    cache = graph.quantization.kv_cache
    if cache == "model":
        return graph
    shape = (graph.config.num_kv_heads,)
    replacements: dict[int, list[Node]] = {}
    specs: dict[str, WeightSpec] = {}
    for index, node in enumerate(graph.nodes):
        if node.op not in ("append_kv", "rope_append_kv", "paged_attention"):
            continue
        layer = int(node.attributes["layer"] or 0)
        names: tuple[str, ...] = kv_scale_names(layer)
        specs |= {name: WeightSpec(name, (name,), "kv_scale", shape, (), "float32") for name in names}
        if node.op == "rope_append_kv" and graph.quantization.key_offsets:
            name, of_head = key_offset_name(layer), (*shape, graph.config.head_dim)
            specs[name] = WeightSpec(name, (name,), "key_offset", of_head, (), "float32")
            names = (*names, name)
        attributes = {**node.attributes, "cache": cache}
        replacements[index] = [replace(node, weights=names, attributes=attributes)]
    return graph.rewrite(replacements, new_weights=specs.values())
