"""A KV cache of bytes, where the engine was told one: its dtype, and a scale a head for keys and for values.

append_kv(k, v); y = paged_attention(q)
->   append_kv(k, v; layer.k_scale, layer.v_scale); y = paged_attention(q; layer.k_scale, layer.v_scale)
"""

from __future__ import annotations

from dataclasses import replace

from fastkernels.compiler.graph import Graph, Node, WeightSpec


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Of a layer's keys and values, as checkpoints call them."""
    return f"model.layers.{layer}.self_attn.k_scale", f"model.layers.{layer}.self_attn.v_scale"


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
        names = kv_scale_names(int(node.attributes["layer"] or 0))
        specs |= {name: WeightSpec(name, (name,), "kv_scale", shape, (), "float32") for name in names}
        attributes = {**node.attributes, "cache": cache}
        replacements[index] = [replace(node, weights=names, attributes=attributes)]
    return graph.rewrite(replacements, new_weights=specs.values())
