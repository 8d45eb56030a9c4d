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


def join_products(graph: fx.Graph) -> None:
    """Have products of one x with prepacked weights of one form share a call, in place."""
    ops = torch.ops.onebit
    place = {node: i for i, node in enumerate(graph.nodes)}
    readers = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.qmm_prepacked.default):
        x, _, _, *form = node.args
        readers[(x, *form)].append(node)
    replaced = []
    for (x, *form), products in readers.items():
        first = products[0]
        known = [p for p in products if place[p.args[1]] < place[first]]
        for start in range(0, len(known) - 1, 3):  # one that is left over stays as it is
            group = known[start : start + 3]
            weights, rows = ([p.args[i] for p in group] for i in (1, 2))
            values = [p.meta["val"] for p in group]
            none = [x.meta["val"].new_empty(0)] * (3 - len(group))
            with graph.inserting_before(first):
                args = (x, weights, rows, *form)
                each = graph.call_function(ops.qmm_prepacked_each.default, args)
                each.meta["val"] = (*values, *none)
                for i, product in enumerate(group):
                    one = graph.call_function(getitem, (each, i))
                    one.meta.update(product.meta)
                    product.replace_all_uses_with(one)
                    replaced.append(product)
    for product in replaced:  # `first` is a place to insert until here
        graph.erase_node(product)
