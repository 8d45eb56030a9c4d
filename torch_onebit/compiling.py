"""compile_options: what to tell torch.compile about a model of 1-bit layers."""

from typing import Any


def compile_options() -> dict[str, Any]:
    """Options with which ``torch.compile`` makes single tokens of 1-bit models faster.

    ``torch.compile(model, options=compile_options())``: prepacked layers that read the same x (q, k
    and v, gate and up) become one call with one set of threads. Products are the same to the last
    bit. They may be merged with other options, and are ``inductor_configs`` of
    ``torch._inductor.aoti_compile_and_package`` too.
    """
    from torch_onebit.joining import JoinProducts  # here: importing Inductor takes seconds

    return {"post_grad_custom_pre_pass": JoinProducts()}
