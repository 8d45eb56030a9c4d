"""Models of prepacked layers: prepack_, what it leaves alone, what is done to them."""

import pytest
import torch
from prepacked_layers import X, needs_kernel
from torch import nn

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, PrepackedLinear, ops, tie


def zoo() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {
            "up": OneBitLinear(128, 256),
            "wide": OneBitLinear(128, 64, dtype=torch.float64),
            "trained": OneBitLinear(128, 64).requires_grad_(),
            "head": OneBitLinear(128, 10),
            "rows": OneBitEmbedding(10, 128),
            "one": OneBitLinear(128, 64),
            "two": OneBitLinear(128, 64),
        }
    )
    tie(model["rows"], model["head"])
    model["two"].weight = model["one"].weight
    return model


@needs_kernel
def test_prepack_reports_bytes_and_what_it_left_alone():
    model = zoo()
    report = torch_onebit.report(torch_onebit.prepack_(model, skip=["rows"]))
    [row] = report.layers
    size = 256 * (128 // 8 + 2 * 4)
    assert (row.name, row.kind) == ("up", "PrepackedLinear")
    assert (row.bytes_before, row.bytes_after) == (size, size + 64)
    assert report.bits_per_weight == 8 * (size + 64) / (256 * 128)
    left = {row.name: row.reason for row in report.left}
    assert left["wide"].startswith("scales must have at most 32 bits")
    assert left["trained"].startswith("scales and biases must not require grad")
    assert left["head"].startswith("weight must be of this layer alone")
    assert left["one"] == left["two"] == "another layer has its weights too"
    with pytest.warns(UserWarning, match="prepacked already"):
        torch_onebit.prepack_(model, skip=["wide", "trained", "head", "one", "two"])
    str(report)
    torch_onebit.count_parameters(model)
    assert type(model["up"]) is PrepackedLinear  # nor did reports change it
    assert type(torch_onebit.unprepack_(model)["up"]) is OneBitLinear


def test_warns_where_kernels_have_no_such_form():
    isa = ops.cpu_isa()
    torch.ops.onebit.set_cpu_isa("scalar")
    try:
        model = nn.Sequential(OneBitLinear(128, 64))
        with pytest.warns(UserWarning, match="kernels"):
            torch_onebit.prepack_(model)
        assert type(model[0]) is OneBitLinear
        with pytest.raises(NotImplementedError, match="got scalar ones"):
            model[0].prepack()
    finally:
        torch.ops.onebit.set_cpu_isa(isa)


# What is done to models, with prepacked layers in them.
def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(OneBitLinear(256, 128, symmetric=True), OneBitLinear(128, 70))
    return model.eval()


def reload(model, tmp_path):
    torch_onebit.save_checkpoint(model, tmp_path)
    return torch_onebit.load_checkpoint(tmp_path, sequential(), symmetrize=True)


def average(kind):
    def run(model, tmp_path):
        averaged = kind(model)  # a deep copy
        averaged.update_parameters(sequential())
        model.unprepack() if hasattr(model, "unprepack") else torch_onebit.unprepack_(model)
        averaged.update_parameters(model)
        return averaged

    return run


DONE = {
    "dequantize_": lambda m, _: torch_onebit.dequantize_(m),
    "prepare_qat_ and convert_": lambda m, _: torch_onebit.convert_(torch_onebit.prepare_qat_(m)),
    "add_lora_": lambda m, _: torch_onebit.add_lora_(m, rank=1),
    "symmetrize_": lambda m, _: torch_onebit.symmetrize_(m),
    "add_lora_, then prepack_": lambda m, _: torch_onebit.prepack_(
        torch_onebit.unprepack_(torch_onebit.add_lora_(m, rank=1))
    ),
    "a checkpoint": reload,
    "AveragedModel of PyTorch": average(torch.optim.swa_utils.AveragedModel),
    "AveragedModel": average(torch_onebit.AveragedModel),
}


@needs_kernel
@pytest.mark.filterwarnings("ignore:symmetrize_ swapped nothing")
@pytest.mark.parametrize("what", DONE)
def test_models_with_prepacked_layers(what, tmp_path):
    model, expected = sequential(), sequential()(X)
    torch_onebit.prepack_(model)
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(DONE[what](model, tmp_path).eval()(X), expected)
