"""The pass of Inductor that has products of one x share a call; imported by compile_options."""

from collections import defaultdict
from operator import getitem

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class JoinProducts(CustomGraphPass):
    def __call__(self, graph: fx.Graph) -> None:
        join_products(graph)

    def uuid(self) -> bytes:
        """Inductor keeps what it compiled under this name too."""
        return get_hash_for_files((__file__,))


def join_products(graph: fx.Graph) -> int:
    """Have products of one x with prepacked weights of one form share a call, in place.

    Returns the number of products that now do.
    """
    ops = torch.ops.onebit
    place = {node: i for i, node in enumerate(graph.nodes)}
    readers = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.qmm_prepacked.default):
        x, _, _, *form = node.args
        readers[x, *form].append(node)
    joined = 0
    for (x, *form), products in readers.items():
        first = products[0]
        group = [p for p in products if place[p.args[1]] < place[first]]
        if len(group) < 2:
            continue
        with graph.inserting_before(first):
            weights, rows = ([p.args[i] for p in group] for i in (1, 2))
            each = graph.call_function(ops.qmm_prepacked_each.default, (x, weights, rows, *form))
            each.meta["val"] = [p.meta["val"] for p in group]
            for i, product in enumerate(group):
                one = graph.call_function(getitem, (each, i))
                one.meta.update(product.meta)
                product.replace_all_uses_with(one)
        for product in group:
            graph.erase_node(product)
        joined += len(group)
    return joined
