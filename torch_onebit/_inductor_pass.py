"""The pass of compile_options in the form that Inductor keys its cache by."""

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from torch_onebit import compiling


class JoinProducts(CustomGraphPass):
    def __call__(self, graph: fx.Graph) -> None:
        compiling.join_products(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, compiling.__file__))
