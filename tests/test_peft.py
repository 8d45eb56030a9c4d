"""LoRA of peft over packed weights: trained, saved, loaded, switched; never merged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_onebit import (
    OneBitEmbedding,
    PrepackedLinear,
    calibrate_,
    convert_,
    dequantize_,
    prepack_,
    prepare_qat_,
    quantize_,
    report,
)

peft = pytest.importorskip("peft")

from torch_onebit.peft import LoraOneBitEmbedding, LoraOneBitLinear, onebit_lora  # noqa: E402

TARGETS = ["embed", "up", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64, padding_idx=0)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 40, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h + self.down(torch.relu(self.up(h))))


IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture
def net():
    return quantize_(Net(), group_size=32)


def config(**options) -> peft.LoraConfig:
    return onebit_lora(peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))


def train(model: nn.Module, steps: int = 30) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_stock_lora_trains_and_the_bits_stay(net):
    before, start = copy.deepcopy(net.state_dict()), net(IDS)
    model = peft.get_peft_model(net, config())
    assert isinstance(model.base_model.model.up, LoraOneBitLinear)
    assert isinstance(model.base_model.model.embed, LoraOneBitEmbedding)
    assert torch.equal(model(IDS), start)  # B starts as zeros
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 6
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    with model.disable_adapter():
        assert torch.equal(model(IDS), start)
    after = model.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_is_saved_and_loaded_over_packed_weights(net, tmp_path):
    base = copy.deepcopy(net)
    model = peft.get_peft_model(net, config())
    train(model, 5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    loaded_config = onebit_lora(peft.PeftConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=loaded_config)
    assert torch.equal(loaded(IDS), model.eval()(IDS))


def test_several_adapters_are_switched(net):
    model = peft.get_peft_model(net, config())
    train(model, 5)
    first = model(IDS)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    assert not torch.equal(model(IDS), first)
    train(model, 5)
    second = model(IDS)
    model.set_adapter("default")
    assert torch.equal(model(IDS), first)
    rows = model.eval()(IDS, adapter_names=["default", "other"])
    torch.testing.assert_close(rows, torch.stack([first[0], second[1]]))


def test_padding_row_of_the_embedding_trains_nothing(net):
    model = peft.get_peft_model(net, config(target_modules=["embed"]))
    model(torch.tensor([[0, 3]])).sum().backward()
    layer = model.base_model.model.embed
    assert isinstance(layer.get_base_layer(), OneBitEmbedding)
    nn.init.ones_(layer.lora_embedding_B["default"])
    model.zero_grad()
    model(torch.tensor([[0, 3]])).sum().backward()
    gradient = layer.lora_embedding_A["default"].grad
    assert (gradient[:, 0] == 0).all()
    assert (gradient[:, 3] != 0).any()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merge_is_refused_and_says_what_to_do(net, call):
    model = peft.get_peft_model(net, config())
    before = net.state_dict()["up.base_layer.weight"].clone()
    with pytest.raises(ValueError, match="keep the adapter, or merge it into the float model"):
        getattr(model, call)()
    assert torch.equal(net.up.base_layer.weight, before)


ADAPTED_FIRST = [
    # what the float layers under adapters become
    lambda model: quantize_(model, group_size=32),
    lambda model: prepare_qat_(model, group_size=32),
    lambda model: prepare_qat_(model, group_size=32, method="learnable"),
    lambda model: calibrate_(model, [IDS], group_size=32, progress=False),
]


@pytest.mark.parametrize("change", ADAPTED_FIRST, ids=["packed", "mean", "learnable", "calibrated"])
def test_adapters_of_float_layers_are_not_merged_into_the_bits_that_these_become(change):
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=TARGETS))
    train(model, 2)
    change(model)
    before = model(IDS)
    for call in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ValueError, match="merge must have float weights"):
            getattr(model, call)()
    assert torch.equal(model(IDS), before)
    dequantize_(convert_(model) if "QAT" in str(model) else model)
    y = model.eval()(IDS)
    torch.testing.assert_close(model.merge_and_unload()(IDS), y)  # float again


def test_layers_that_hold_an_adapter_already_stay_float():
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["up"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="swapped nothing"):
        quantize_(model, group_size=32, skip=["embed", "down", "head"])
    reasons = {row.name: row.reason for row in report(model).left}
    assert reasons["base_model.model.up.base_layer"] == "its adapter is merged: unmerge it first"


def test_all_linear_means_packed_layers_too(net):
    options = {"r": 4, "target_modules": "all-linear"}
    with pytest.raises(ValueError, match="model must be given where target_modules is 'all-lin"):
        onebit_lora(peft.LoraConfig(**options))
    lora = onebit_lora(peft.LoraConfig(**options), net)
    assert set(lora.target_modules) == {"up", "down", "head"}
    peft.get_peft_model(net, lora)
    assert isinstance(net.head, LoraOneBitLinear)


def test_all_linear_leaves_the_head_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = quantize_(transformers.LlamaForCausalLM(config), group_size=32, skip=["q_proj"])
    lora = onebit_lora(peft.LoraConfig(target_modules="all-linear"), model)
    adapted = peft.get_peft_model(model, lora)
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in adapted.named_modules()}
    assert kinds["q_proj"] == "Linear"  # of peft: float weights below it
    assert (kinds["k_proj"], kinds["down_proj"]) == ("LoraOneBitLinear",) * 2
    assert len(lora.target_modules) == 7


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_initialisations_that_need_float_weights_are_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights must be one of .* got '{init}'"):
        config(init_lora_weights=init)


def test_dora_is_refused(net):
    with pytest.raises(ValueError, match="unsupported variant"):
        peft.get_peft_model(net, config(use_dora=True))


def test_another_config_is_refused():
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got dict"):
        onebit_lora({})


@pytest.mark.skipif(not torch.ops.onebit.can_prepack(), reason="no kernels of prepacked weights")
def test_adapters_go_over_prepacked_layers_and_layers_under_adapters_prepack(net):
    expected = prepack_(net)(IDS)
    model = peft.get_peft_model(net, config()).eval()
    torch.testing.assert_close(model(IDS), expected)
    prepack_(model)
    assert isinstance(model.base_model.model.up.base_layer, PrepackedLinear)
    torch.testing.assert_close(model(IDS), expected)
    losses = train(model)
    assert losses[-1] < losses[0] / 2
