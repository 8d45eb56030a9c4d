"""Training beside frozen bits: levels, LoRA, distillation, averaging, and their memory."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils
from torch.utils.flop_counter import FlopCounterMode

from torch_onebit import (
    AveragedModel,
    Distillation,
    LoRALinear,
    OneBitLinear,
    add_lora_,
    count_parameters,
    parameter_groups,
    prepare_qat_,
    quantize_,
    thaw_levels_,
)


def packed_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    return quantize_(model, group_size=32)


def train(model, steps: int = 20) -> list[float]:
    x, y = torch.randn(32, 64), torch.randn(32, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_levels_and_lora_train_while_bits_stay():
    model = add_lora_(thaw_levels_(packed_model()), rank=4)
    bits = [m.weight.clone() for m in model.modules() if isinstance(m, OneBitLinear)]
    levels = [m.scales.clone() for m in model.modules() if isinstance(m, OneBitLinear)]
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    after = [m for m in model.modules() if isinstance(m, OneBitLinear)]
    assert all(torch.equal(m.weight, b) for m, b in zip(after, bits, strict=True))
    assert not any(torch.equal(m.scales, s) for m, s in zip(after, levels, strict=True))


def test_lora_changes_nothing_at_first_and_is_the_low_rank_product():
    model, x = packed_model(), torch.randn(3, 64)
    before = model(x)
    add_lora_(model, rank=4, alpha=8, filter_fn=lambda m, name: name == "0")
    assert isinstance(model[0], LoRALinear) and isinstance(model[2], OneBitLinear)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model[0].lora_b.normal_()
    layer = model[0]
    expected = layer.base(x) + 2 * (x @ layer.lora_a.t() @ layer.lora_b.t())
    torch.testing.assert_close(layer(x), expected)


def test_adding_lora_twice_adds_it_once_and_keeps_shared_layers():
    shared = OneBitLinear(64, 64, group_size=32)
    model = add_lora_(add_lora_(nn.Sequential(shared, shared)))
    assert model[0] is model[1] and isinstance(model[0].base, OneBitLinear)


def test_lora_under_autocast():
    model = add_lora_(packed_model())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, 64)).dtype == torch.bfloat16


def test_training_on_packed_weights_holds_a_tenth_of_float16():
    """State of a layer that trains levels, and what autograd keeps, against float16 weights."""
    layer = OneBitLinear(2048, 2048, bias=False, group_size=128, dtype=torch.bfloat16)
    kept = []
    own = {t.data_ptr() for t in (layer.weight, layer.scales, layer.biases)}

    def pack(t):
        if t.data_ptr() not in own:
            kept.append(t.numel() * t.element_size())
        return t

    x = torch.randn(1, 2048, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        thaw_levels_(layer)(x)
    state = sum(t.numel() * t.element_size() for t in (layer.weight, layer.scales, layer.biases))
    assert state + sum(kept) <= 2048 * 2048 * 2 / 10


@pytest.mark.parametrize("weight, temperature", [(0.5, 1.0), (1.0, 2.0), (0.0, 1.0)])
def test_distillation_is_its_formula(weight, temperature):
    teacher = nn.Linear(8, 5)
    logits, targets = torch.randn(2, 3, 5, requires_grad=True), torch.randint(5, (2, 3))
    targets[0, 0] = -100
    inputs = torch.randn(2, 3, 8)
    loss = Distillation(teacher, weight=weight, temperature=temperature)(logits, targets, inputs)
    kept = targets != -100
    student, wanted = logits[kept], teacher(inputs)[kept]
    p, q = (wanted / temperature).softmax(-1), (student / temperature).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    expected = (1 - weight) * F.cross_entropy(student, targets[kept])
    expected = expected + weight * temperature**2 * divergence
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.weight.grad is None


def test_distillation_owns_no_parameters():
    assert not list(Distillation(nn.Linear(2, 2)).parameters())


AVERAGES = {
    "swa": {},
    "swa, one by one": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)},
    "ema, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.5)},
}


OURS_OR_TORCHS = [(AveragedModel, True), (AveragedModel, False), (swa_utils.AveragedModel, False)]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("cls, use_buffers", OURS_OR_TORCHS)
def test_packed_words_are_never_averaged(cls, use_buffers, average):
    model = nn.Sequential(OneBitLinear(64, 64, group_size=32), nn.BatchNorm1d(64))
    averaged = cls(model, use_buffers=use_buffers, **AVERAGES[average])
    for _ in range(3):
        model(torch.randn(8, 64))
        with torch.no_grad():
            model[0].scales.add_(1.0)
        averaged.update_parameters(model)
    assert type(averaged) is cls
    assert torch.equal(averaged.module[0].weight, model[0].weight)
    assert not torch.equal(averaged.module[0].scales, model[0].scales)
    same = torch.equal(averaged.module[1].running_mean, model[1].running_mean)
    assert same != use_buffers


COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("how", COPIES)
def test_torchs_average_of_buffers_is_refused_for_packed_layers(how):
    model = packed_model()
    averaged = COPIES[how](swa_utils.AveragedModel(model, use_buffers=True))
    with pytest.raises(ValueError, match=r"use_buffers must be False .*\.AveragedModel"):
        averaged.update_parameters(model)
    plain = swa_utils.AveragedModel(nn.Linear(2, 2), use_buffers=True)
    plain.update_parameters(nn.Linear(2, 2))  # other models are none of our business


def test_latent_weights_are_averaged():
    model = prepare_qat_(nn.Sequential(nn.Linear(64, 8)), group_size=32)
    average = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    first = copy.deepcopy(model[0].weight)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, first + 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: add_lora_(packed_model(), rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: Distillation(nn.Linear(2, 2), weight=2.0), "weight must be .* got 2.0"),
        (lambda: Distillation(nn.Linear(2, 2), temperature=0), "temperature must be .* got 0"),
    ],
)
def test_illegal_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Output:
    def __init__(self, logits):
        self.logits = logits


class Model(nn.Module):
    """Takes keywords and returns an object, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 5)

    def forward(self, *, values):
        return Output(self.head(values))


def test_distillation_takes_keywords_and_objects_with_logits():
    student, teacher = Model(), Model()
    x, targets = torch.randn(4, 32), torch.randint(5, (4,))
    loss_fn = Distillation(teacher)
    expected = Distillation(teacher.head)(student.head(x), targets, x)
    torch.testing.assert_close(loss_fn(student(values=x), targets, values=x), expected)
    as_dict = {"logits": student.head(x)}
    torch.testing.assert_close(loss_fn(as_dict, targets, values=x), expected)
    with pytest.raises(TypeError, match="logits must be a tensor or have logits, got str"):
        loss_fn("x", targets, values=x)


def test_a_teacher_that_is_being_trained_is_refused():
    model = Model()
    loss_fn = Distillation(model)
    prepare_qat_(model, group_size=32)
    x, targets = torch.randn(4, 32), torch.randint(5, (4,))
    with pytest.raises(ValueError, match=r"teacher must share no parameters .* got 2 shared"):
        loss_fn(model(values=x), targets, values=x)
    Distillation(copy.deepcopy(model))(model(values=x), targets, values=x)


def test_the_teacher_follows_its_loss_and_trains_nothing():
    teacher = Model()
    loss_fn = Distillation(teacher).to(torch.float64)
    assert teacher.head.weight.dtype == torch.float64
    assert not list(loss_fn.parameters()) and not loss_fn.state_dict()


def test_levels_and_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    prepare_qat_(model, group_size=32, method="learnable", filter_fn=lambda m, n: n == "0")
    decayed, kept = parameter_groups(model, weight_decay=0.5, lr=0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    before = model[0].scales.clone(), model[0].weight.clone()
    for group in (decayed, kept):
        group["lr"] = 0.1
    optimizer = torch.optim.AdamW([decayed, kept])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model[0].scales, before[0])
    torch.testing.assert_close(model[0].weight, before[1] * 0.95)


def test_counts_say_what_is_there():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 100))
    total = sum(p.numel() for p in model.parameters())
    quantize_(model, group_size=32)
    count = count_parameters(model)
    assert count.weights == total
    assert (count.packed, count.levels, count.floats) == (64 * 164, 2 * 164 * 2, 164)
    assert count.bytes == 64 * 164 // 8 + (count.levels + count.floats) * 4
    assert sum(p.numel() for p in model.parameters()) == count.levels + count.floats


def test_flops_are_those_of_the_dense_model():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), torch.randn(3, 5, 64)
    with FlopCounterMode(display=False) as dense:
        model(x)
    quantize_(model, group_size=32)
    with FlopCounterMode(display=False) as packed:
        model(x)
    assert packed.get_total_flops() == dense.get_total_flops() == 2 * 15 * 64 * (64 + 96)
    prepare_qat_(model)
    with FlopCounterMode(display=False) as trained:
        model(x)
    assert trained.get_total_flops() == dense.get_total_flops()
