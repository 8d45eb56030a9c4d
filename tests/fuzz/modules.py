"""Random sequences of module calls, each also done to a plain PyTorch twin; both must agree.

The twin is a dictionary of plain tensors, edited as PyTorch says they are, and a float64 product.
After every step the layers must show its tensors, bit for bit, and compute with them.
"""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import torch_onebit
from fuzz.calls import exact, expect_near, magnitude, unpacked
from fuzz.tensors import FLOATS, GROUP_SIZES
from torch_onebit import OneBitEmbedding, OneBitLinear, PrepackedLinear
from torch_onebit.nn import OneBitModule

ops = torch.ops.onebit
ISAS = ops.cpu_isas()
NAMES = ("weight", "scales", "biases", "bias")
ROUND_TRIP_METHODS = ("optimal", "sign", "mean", "minmax")

Twin = dict[str, dict[str, Tensor]]  # by name of the layer, by name of the tensor


class Pair:
    """A model, its twin, and what was done to both."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.history: list[str] = []
        self.compiled: dict[str, nn.Module] = {}
        self.model = self._start()
        self.twin = self.shown()

    def _start(self) -> nn.Module:
        choose, group_size = self.choose, self.choose.choice([32, *GROUP_SIZES])
        k, n = (group_size * choose.choice([1, 1, 2]) for _ in range(2))
        symmetric, bias = choose.random() < 0.3, choose.random() < 0.7
        kind = choose.choice(["packed", "quantized", "tied", "trained"])
        self.history.append(f"{kind} {k} -> {n}, group {group_size}, symmetric={symmetric}")
        if kind == "packed":
            options = {"group_size": group_size, "symmetric": symmetric}
            return nn.Sequential(
                OneBitLinear(k, choose.choice([1, 3, 64, 70]), bias, **options),
                OneBitEmbedding(choose.choice([1, 9]), k, **options),
            )
        model = nn.Sequential(nn.Linear(k, n, bias), nn.Linear(n, choose.choice([5, 66])))
        if kind == "tied":
            model = nn.Sequential(nn.Embedding(7, k), nn.Linear(k, 7, bias))
            model[1].weight = model[0].weight
        if kind == "trained":
            rule = "sign" if symmetric else choose.choice(["mean", "sign", "optimal", "learnable"])
            torch_onebit.prepare_qat_(
                model, method=rule, group_size=group_size, symmetric=symmetric
            )
            return torch_onebit.convert_(model)
        method = choose.choice(["optimal", "sign"] if symmetric else ROUND_TRIP_METHODS)
        return torch_onebit.quantize_(
            model, group_size=group_size, symmetric=symmetric, method=method, progress=False
        )

    def layers(self) -> dict[str, OneBitModule]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, OneBitModule)}

    def canonical(self) -> dict[str, OneBitModule]:
        """The layers, to be read without a change of those that are prepacked."""
        return {name: layer.canonical() for name, layer in self.layers().items()}

    def shown(self) -> Twin:
        """What the layers show, copied; what they share is shared."""
        copies: dict[int, Tensor] = {}
        return {
            name: {
                key: copies.setdefault(id(t), t.detach().clone())
                for key in NAMES
                if (t := getattr(layer, key, None)) is not None
            }
            for name, layer in self.canonical().items()
        }

    def pick(self) -> tuple[str, OneBitModule, str, Tensor]:
        """A layer and one of its tensors."""
        name = self.choose.choice(list(self.twin))
        key = self.choose.choice(list(self.twin[name]))
        layer = self.layers()[name]
        return name, layer, key, getattr(layer, key)

    def check(self, everything: bool = True) -> None:
        """That layers show the twin's tensors, and that one of them, or all, compute with them."""
        layers = self.layers()
        computing = set(layers) if everything else {self.choose.choice(list(layers))}
        assert layers.keys() == self.twin.keys()
        for name, layer in layers.items():
            read = layer if self.choose.random() < 0.2 else layer.canonical()
            for key, want in self.twin[name].items():
                got = getattr(read, key)
                assert got.dtype == want.dtype, f"{name}.{key} is {got.dtype}"
                assert torch.equal(got, want), f"{name}.{key} is not what it should be"
            if name in computing:
                self.check_forward(layer, layer, self.twin[name])
            if name in self.compiled:
                self.check_forward(layer, self.compiled[name], self.twin[name])

    def check_forward(self, layer: OneBitModule, call: Callable, own: dict[str, Tensor]) -> None:
        """The product, and for an embedding the rows."""
        choose, group_size = self.choose, layer.group_size
        levels = (own["weight"], own["scales"], own.get("biases"), group_size)
        columns = getattr(layer, layer.columns_name)  # the last group may be filled up
        w, size = exact(*levels)[:, :columns], magnitude(*levels)[:, :columns]
        mode = choose.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
        if isinstance(layer, OneBitEmbedding):
            indices = torch.randint(0, w.shape[0], (choose.choice([1, 3]),))
            with mode():
                rows = call(indices)
            expect_near(rows, w[indices], size[indices], rows.dtype, 1)
            call = layer.as_linear
        dtype = choose.choice([own["scales"].dtype, torch.float32])
        x = torch.randn(choose.choice([1, 2, 4, 5, 9, 70]), w.shape[1]).to(dtype)
        with mode():
            y = call(x)
        want, mass = x.double() @ w.mT, x.double().abs() @ size.mT
        if "bias" in own:
            mass = mass + want.abs() + own["bias"].double().abs()
            want = want + own["bias"].double()
        assert y.dtype == dtype
        expect_near(y, want, mass, dtype, x.shape[-1])


# Steps: each does something to the model and what it means to the twin
# --------------------------------------------------------------------------------------------------


def new_values(choose: random.Random, key: str, t: Tensor) -> Tensor:
    if key == "weight":
        return torch.randint(-(2**31), 2**31, t.shape).to(torch.int32)
    return (torch.rand(t.shape) * choose.choice([0.1, 1.0]) + 0.01).to(t.dtype)


def write_part(choose: random.Random, new: Tensor) -> Callable[[Tensor], None]:
    """A write of some of new into a tensor of its shape."""
    if choose.random() < 0.5 or not new.numel():
        return lambda t: t.copy_(new)
    i = choose.randrange(new.shape[0])
    j = choose.randrange(new.shape[-1])
    return lambda t: t[i].copy_(new[i]) if t.dim() == 1 else t[i, j].copy_(new[i, j])


def edit_in_place(pair: Pair) -> str:
    choose = pair.choose
    name, _, key, t = pair.pick()
    write = write_part(choose, new_values(choose, key, t))
    how = choose.choice(["no_grad", "data", "detach", "numpy", "inference_mode"])
    if how == "numpy" and t.dtype == torch.bfloat16:
        how = "data"
    if how == "no_grad":
        with torch.no_grad():
            write(t)
    elif how == "data":
        write(t.data)
    elif how == "detach":
        write(t.detach())
    elif how == "numpy":
        write(torch.from_numpy(t.detach().numpy()))
    else:
        with torch.inference_mode():
            write(t)
    write(pair.twin[name][key])
    return f"write {name}.{key} by {how}"


def replace(pair: Pair) -> str:
    choose = pair.choose
    name, layer, key, t = pair.pick()
    new = new_values(choose, key, t)
    how = choose.choice(["attribute", "data", "strided"])
    if how == "strided" and new.dim() > 1:
        new = new.mT.contiguous().mT
    pair.twin[name][key] = new.clone()
    if how == "data":
        before, now = t.data_ptr(), new.clone()
        for other in pair.twin:  # .data is shared by all who hold the tensor
            if getattr(pair.layers()[other], key, None) is t:
                pair.twin[other][key] = pair.twin[name][key]
        t.data = now
        assert before != now.data_ptr()
    else:
        setattr(layer, key, new if key == "weight" else nn.Parameter(new, t.requires_grad))
    return f"replace {name}.{key} by {how}"


def prepack(pair: Pair) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # kernels without such a form
        torch_onebit.prepack_(pair.model, filter_fn=lambda m, n: pair.choose.random() < 0.8)
    return f"prepack_ {share_as_shown(pair)}"


def unprepack(pair: Pair) -> str:
    if pair.choose.random() < 0.5:
        torch_onebit.unprepack_(pair.model)
        return "unprepack_"
    name = pair.choose.choice(list(pair.twin))
    layer = pair.layers()[name]
    if isinstance(layer, PrepackedLinear):
        layer.unprepack()
    return f"unprepack {name}"


# What changes no weights, though it may change how they are held.
TOUCHES: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "to cpu": lambda m: m.to("cpu"),
    "frozen": lambda m: m.requires_grad_(False),
    "share_memory": lambda m: m.share_memory(),
    "state_dict": lambda m: m.state_dict(),
    "printed": lambda m: repr(m),
    "counted": lambda m: torch_onebit.count_parameters(m),
    "loaded as it is": lambda m: m.load_state_dict(m.state_dict()),
}


def touch(pair: Pair) -> str:
    what = pair.choose.choice(list(TOUCHES))
    TOUCHES[what](pair.model)
    share_as_shown(pair)
    return what


def call_functionally(pair: Pair) -> str:
    """A call with one tensor replaced, which must count for that call alone."""
    name, choose = pair.choose.choice(list(pair.twin)), pair.choose
    layer, key = pair.layers()[name], choose.choice(list(pair.twin[name]))
    if isinstance(layer, OneBitEmbedding):
        return "nothing: rows are not a product"
    if isinstance(layer, PrepackedLinear) and key in ("scales", "biases"):
        layer.unprepack()  # which it asks for
    new = new_values(choose, key, pair.twin[name][key])

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {key: new}, (x,))

    pair.check_forward(layer, call, {**pair.twin[name], key: new})
    return f"functional_call of {name} with another {key}"


def cast(pair: Pair) -> str:
    dtype = pair.choose.choice(FLOATS)
    pair.model.to(dtype)
    for own in pair.twin.values():
        for key, t in own.items():
            if key != "weight":
                own[key] = t.to(dtype)
    share_as_shown(pair)
    return f"to {dtype}"


def deep_copy(pair: Pair) -> str:
    pair.compiled.clear()
    pair.model = copy.deepcopy(pair.model)
    share_as_shown(pair)
    return "deepcopy"


def pickled(pair: Pair) -> str:
    pair.compiled.clear()
    pair.model = pickle.loads(pickle.dumps(pair.model))
    share_as_shown(pair)  # pickle keeps shared tensors, not shared storages
    return "pickle"


def saved(pair: Pair) -> str:
    """A state_dict through a file, changed on the way, into this model or a fresh copy of it."""
    choose, file = pair.choose, io.BytesIO()
    torch.save(pair.model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assign, fresh = choose.random() < 0.5, choose.random() < 0.5
    if choose.random() < 0.5:
        name, _, key, t = pair.pick()
        new = new_values(choose, key, t)
        state[f"{name}.{key}"].copy_(new)  # the tied see it too: they share a storage in the file
        for other, own in pair.twin.items():
            if other == name or (key in own and own[key] is pair.twin[name][key]):
                state[f"{other}.{key}"].copy_(new)
        pair.twin[name][key].copy_(new)
    if fresh:
        pair.compiled.clear()
        pair.model = copy.deepcopy(pair.model)
        with torch.no_grad():
            for layer in pair.layers().values():
                layer.weight.zero_()
    if choose.random() < 0.3:
        state = {k: v.view(torch.uint32) if v.dtype == torch.int32 else v for k, v in state.items()}
    pair.model.load_state_dict(state, assign=assign)
    if assign or fresh:
        share_as_shown(pair)
    return f"load_state_dict(assign={assign}), fresh={fresh}"


def share_as_shown(pair: Pair) -> str:
    """Let the twin share what the layers share: that is PyTorch's affair. Prepacked ones have
    their weights alone. Says which those are."""
    first: dict[int, Tensor] = {}
    prepacked = []
    for name, layer in pair.layers().items():
        if isinstance(layer, PrepackedLinear):
            prepacked.append(name)
        for key, t in pair.twin[name].items():
            if isinstance(layer, PrepackedLinear) and key != "bias":
                pair.twin[name][key] = t.clone()
                continue
            place = getattr(layer, key).data_ptr()
            pair.twin[name][key] = first[place] = first.get(place, t.clone())
    return " ".join(prepacked)


def train(pair: Pair) -> str:
    """A step of SGD: gradients are those of plain PyTorch."""
    name, layer, _, _ = pair.pick()
    own = pair.twin[name]
    if any(getattr(layer, key).is_inference() for key in own):
        return "nothing: inference tensors do not train"
    keys = [key for key in own if key != "weight"]
    before = {key: getattr(layer, key).requires_grad for key in keys}
    layer.requires_grad_(True)
    x = torch.randn(3, own["weight"].shape[1] * 32).to(own["scales"].dtype)
    y = layer.as_linear(x) if isinstance(layer, OneBitEmbedding) else layer(x)
    g = torch.randn(y.shape).to(y.dtype)
    got = torch.autograd.grad(y, [getattr(layer, key) for key in keys], g)
    bits = unpacked(own["weight"]).double().unflatten(-1, (own["scales"].shape[-1], -1))

    def plain(map_tensor: Callable[[Tensor], Tensor]) -> list[Tensor]:
        dw = (map_tensor(g.double()).mT @ map_tensor(x.double())).view_as(bits)
        low = (dw * bits).sum(-1), dw.sum(-1)
        symmetric = low[0] + low[1] * map_tensor(torch.tensor(-0.5).double())
        scales = low[0] if "biases" in own else symmetric
        sums = {"scales": scales, "biases": low[1], "bias": map_tensor(g.double()).sum(0)}
        return [sums[key] for key in keys]

    for key, t, want, mass in zip(keys, got, plain(lambda t: t), plain(Tensor.abs), strict=True):
        dtype = t.dtype if key == "bias" else torch.float32
        expect_near(t, want, mass + want.abs(), torch.promote_types(dtype, torch.float16), 128)
    with torch.no_grad():
        for key, t in zip(keys, got, strict=True):
            step = (
                t * 1e-3
            )  # not sub_'s alpha, which rounds by the layout of what is subtracted from
            getattr(layer, key).sub_(step)
            own[key].sub_(step)
    for key in keys:
        getattr(layer, key).requires_grad_(before[key])
    return f"train {name}"


def swap_kernels(pair: Pair) -> str:
    isa = pair.choose.choice(ISAS)
    ops.set_cpu_isa(isa)
    return isa


def compile_layer(pair: Pair) -> str:
    if pair.choose.random() > 0.015:  # a hundred times dearer than other steps
        return "nothing"
    name = pair.choose.choice(list(pair.twin))
    layer = pair.layers()[name]
    if any(getattr(layer.canonical(), key).is_inference() for key in pair.twin[name]):
        return "nothing: inference tensors do not compile"
    pair.compiled[name] = torch.compile(layer, backend="eager", dynamic=True)
    return f"compile {name}"


def through_training(pair: Pair) -> str:
    """prepare_qat_ and convert_ without a step between keep the weights, to rounding."""
    before = decoded(pair)
    pair.compiled.clear()
    torch_onebit.prepare_qat_(pair.model)
    torch_onebit.convert_(pair.model)
    expect_same_weights(pair, before)
    return "prepare_qat_, convert_"


def through_floats(pair: Pair) -> str:
    """dequantize_, and quantize_ by minmax, keep the weights, to rounding."""
    before, group_size = decoded(pair), next(iter(pair.layers().values())).group_size
    symmetric = next(iter(pair.layers().values())).symmetric
    pair.compiled.clear()
    torch_onebit.dequantize_(pair.model)
    if symmetric:
        torch_onebit.quantize_(
            pair.model, group_size=group_size, symmetric=True, method="sign", progress=False
        )
    else:
        torch_onebit.quantize_(pair.model, group_size=group_size, method="minmax", progress=False)
    expect_same_weights(pair, before)
    return "dequantize_, quantize_"


def decoded(pair: Pair) -> dict[str, Tensor]:
    return {
        name: exact(own["weight"], own["scales"], own.get("biases"), layer.group_size)
        for (name, own), layer in zip(pair.twin.items(), pair.layers().values(), strict=True)
    }


def expect_same_weights(pair: Pair, before: dict[str, Tensor]) -> None:
    pair.twin = pair.shown()
    for name, w in decoded(pair).items():
        own = pair.twin[name]
        size = before[name].abs().amax() + w.abs().amax() + 1e-6
        eps = torch.finfo(own["scales"].dtype).eps
        worst = float((w - before[name]).abs().max())
        assert worst <= 4 * size * max(eps, 1e-7), f"weights of {name} moved by {worst}"


STEPS: list[Callable[[Pair], str]] = [
    edit_in_place,
    edit_in_place,
    replace,
    prepack,
    prepack,
    prepack,
    unprepack,
    touch,
    call_functionally,
    cast,
    deep_copy,
    pickled,
    saved,
    train,
    swap_kernels,
    compile_layer,
    through_training,
    through_floats,
]


def case(number: int) -> int:
    choose = random.Random(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond
    ops.set_cpu_isa(choose.choice(ISAS))
    pair = Pair(choose)
    steps = choose.randint(2, 8)
    compiles = False
    try:
        for _ in range(steps):
            step = choose.choice(STEPS)
            pair.history.append(step.__name__)
            pair.history[-1] = step(pair)
            compiles |= bool(pair.compiled)
            pair.check(everything=False)
        pair.check()
    except Exception as error:
        raise AssertionError("after " + "; ".join(pair.history)) from error
    if compiles:
        torch._dynamo.reset()
    return steps + 2
