"""compile_options: what to tell torch.compile about a model of 1-bit layers."""

from collections import defaultdict
from operator import getitem
from typing import Any

import torch
from torch import fx

# Values that are worth a second thread: fewer take less time than waking it. Inductor's default,
# 512, has two threads share one norm of a token.
MIN_CHUNK = 4096


def compile_options() -> dict[str, Any]:
    """Options with which ``torch.compile`` makes single tokens of 1-bit models faster.

    ``torch.compile(model, options=compile_options())``: prepacked layers that read the same x (q, k
    and v, gate and up) become one call with one set of threads, and loops over the few values of a
    token stay on one thread. Products are the same to the last bit. They may be merged with other
    options, and are ``inductor_configs`` of ``torch._inductor.aoti_compile_and_package`` too.
    """
    from torch_onebit._inductor_pass import JoinProducts  # here: importing Inductor takes seconds

    return {"post_grad_custom_pre_pass": JoinProducts(), "cpp.min_chunk_size": MIN_CHUNK}


def join_products(graph: fx.Graph) -> int:
    """Have products of one x with prepacked weights of one form share a call, in place.

    Returns the number of products that now do.
    """
    ops = torch.ops.onebit
    place = {node: i for i, node in enumerate(graph.nodes)}
    readers = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.qmm_prepacked.default):
        x, _, _, *form = node.args
        key = (x, *form)
        readers[key].append(node)
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
