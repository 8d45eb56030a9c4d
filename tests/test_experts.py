"""Experts of a mixture over packed weights: computed, saved, loaded, and mlx-lm agrees."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from torch_onebit import (
    QATExperts,
    calibrate_,
    convert_,
    count_parameters,
    dequantize_,
    load_checkpoint,
    prepare_qat_,
    quantize_,
    report,
    save_checkpoint,
    symmetrize_,
    thaw_levels_,
)
from torch_onebit.checkpoint import CheckpointError
from torch_onebit.nn import OneBitExperts, OneBitStack

transformers = pytest.importorskip("transformers")

from torch_onebit.transformers import OneBitConfig, attach_quantizer_  # noqa: E402

AutoModelForCausalLM = transformers.AutoModelForCausalLM
FEW = torch.arange(6)[None]  # 12 products: experts as they come
MANY = torch.arange(80)[None]  # 160: sorted
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 80,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def build(kind: str = "qwen3_moe", **sizes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:  # transformers' start would leave the rest of the model alone
            nn.init.normal_(parameter, std=0.2)
    return model


def onebit(**options) -> nn.Module:
    return quantize_(build(), group_size=32, **{"skip": [], **options})


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_experts_compute_what_float_ones_do(symmetric, ids):
    model = onebit(symmetric=symmetric)
    dense = dequantize_(copy.deepcopy(model))
    assert not any("OneBit" in type(m).__name__ for m in dense.modules())
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_over_experts_in_float32(dtype):
    experts = onebit().model.layers[0].mlp.experts
    x = torch.randn(5, 64)
    chosen = torch.tensor([[0, 1], [3, 2], [1, 1], [0, 3], [2, 0]])
    weights = torch.rand(5, 2)
    exact = experts(x, chosen, weights)
    got = experts.to(dtype)(x.to(dtype), chosen, weights.to(dtype))
    assert got.dtype == dtype
    error = (got.float() - exact).norm() / exact.norm()
    assert error < 3 * torch.finfo(dtype).eps


def test_columns_that_fill_no_group():
    model = quantize_(build(), group_size=128)  # 64 and 96 columns
    dense = dequantize_(copy.deepcopy(model))
    torch.testing.assert_close(model(FEW).logits, dense(FEW).logits, rtol=0, atol=1e-5)


def test_report_and_counts():
    dense = build()
    model = quantize_(copy.deepcopy(dense), group_size=32, skip=["layers.1.mlp.experts"])
    row = next(row for row in report(model).layers if row.name.endswith("experts"))
    weights = 4 * 3 * 96 * 64
    assert (row.kind, row.shape, row.bytes_before) == (
        "OneBitExperts",
        (4, 3 * 96, 64),
        4 * weights,
    )
    assert row.bytes_after == weights / 8 + 2 * 4 * weights / 32
    left = {row.name: row.reason for row in report(model).left}
    assert left["model.layers.1.mlp.experts.down_proj"] == "skip has 'layers.1.mlp.experts'"
    counts = count_parameters(quantize_(copy.deepcopy(dense), group_size=32, skip=[]))
    assert counts.weights == sum(p.numel() for p in dense.parameters())


class Oddly(nn.Module):
    """A model with experts of a form that says it is another."""

    def __init__(self, **form):
        super().__init__()
        self.experts = build(num_hidden_layers=1).model.layers[0].mlp.experts
        self.head = nn.Linear(32, 32)
        for name, value in form.items():
            setattr(self.experts, name, value)


FORMS = [
    ({"has_bias": True}, "its experts have biases"),
    ({"has_gate": False}, "its experts have no gate"),
    ({"is_transposed": True}, "its matrices are stored transposed"),
    ({"is_concatenated": False}, "rows of gate and up alternate"),
    ({"has_post_expert_norm": True}, "its experts have norms"),
    ({"_is_expert_parallel": True}, "its experts are spread over devices"),
    ({"extra": nn.Parameter(torch.ones(2))}, "its parameters are down_proj, extra, gate_up_proj"),
    ({"gate_up_proj": nn.Parameter(torch.ones(4, 2, 64))}, "gate_up_proj has shape [4, 2, 64]"),
]


@pytest.mark.parametrize("form, reason", FORMS, ids=[r for _, r in FORMS])
def test_other_forms_stay_float_and_say_why(form, reason):
    model = quantize_(Oddly(**form), group_size=32)
    assert {row.reason for row in report(model).left if "proj" in row.name} == {reason}
    with pytest.raises(ValueError, match="experts must be gate, up and down projections"):
        OneBitExperts.from_experts(model.experts)


MIXTURES = [  # model_type, options, why
    ("qwen3_moe", {}, "the plain case"),
    ("qwen3_moe", {"symmetric": True}, "no biases"),
    ("qwen3_moe", {"group_size": 128}, "columns that fill no group"),
    ("mixtral", {}, "another router"),
    ("qwen2_moe", {}, "a shared expert is given the same inputs"),
]


@pytest.mark.parametrize("kind, options, why", MIXTURES, ids=[m[-1] for m in MIXTURES])
def test_calibrated_experts_are_nearer_to_the_float_ones(kind, options, why):
    sizes = {"num_local_experts": 4, "shared_expert_intermediate_size": 64}
    dense = build(kind, num_hidden_layers=1, **sizes)
    options = {
        "group_size": 32,
        "progress": False,
        "skip": ["embed_tokens", "self_attn"],
        **options,
    }
    batches = [torch.randint(80, (8, 32)) for _ in range(2)]
    models = {
        "float": dense,
        "plain": quantize_(copy.deepcopy(dense), **options),
        "calibrated": calibrate_(copy.deepcopy(dense), batches, **options),
    }
    outputs = {}
    for name, model in models.items():
        keep = lambda module, x, y, name=name: outputs.update({name: y})
        model.model.layers[0].mlp.experts.register_forward_hook(keep)
        with torch.no_grad():
            model(batches[0])
    plain, calibrated = (
        float((outputs[name] - outputs["float"]).square().sum() / outputs["float"].square().sum())
        for name in ("plain", "calibrated")
    )
    assert calibrated < 0.8 * plain
    experts = models["calibrated"].model.layers[0].mlp.experts
    assert experts.symmetric == options.get("symmetric", False)
    (row,) = (r for r in report(models["calibrated"]).layers if r.name.endswith("mlp.experts"))
    assert row.kind == "OneBitExperts"
    assert row.output_error == pytest.approx(calibrated, rel=0.1)  # of both batches


def test_experts_without_rows_are_made_without_data(tmp_path):
    dense, ids = build(), torch.tensor([[7]])  # one token: two of four experts have rows
    options = {"group_size": 32, "progress": False, "checkpoint": tmp_path}
    model = calibrate_(copy.deepcopy(dense), [ids], **options)
    plain = quantize_(copy.deepcopy(dense), group_size=32)
    notes = {row.name: row.note for row in report(model).layers}
    assert notes["model.layers.0.mlp.experts"] == "2 of 4 experts without rows"
    ours, theirs = (m.model.layers[0].mlp.experts.up_proj.weight for m in (model, plain))
    same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) == 2
    assert_same(calibrate_(copy.deepcopy(dense), [ids], **options), model)  # from the files
    assert len(list(tmp_path.iterdir())) == len(report(model).layers)


QAT = [  # (the model, options of prepare_qat_, parameters of the experts)
    ("float", {}, 2),
    ("float", {"method": "learnable"}, 6),
    ("float", {"symmetric": True}, 2),
    ("packed", {}, 6),  # learnable levels
    ("symmetric", {}, 4),
]


@pytest.mark.parametrize("start, options, parameters", QAT)
def test_experts_train_their_latent_weights_and_are_packed_again(start, options, parameters):
    model = build() if start == "float" else onebit(symmetric=start == "symmetric")
    before = model(MANY).logits
    kept = set(model.parameters()) if start == "float" else set()
    prepare_qat_(model, filter_fn=lambda m, _: {"group_size": 32}, progress=False, **options)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QATExperts)
    assert len(list(experts.parameters())) == parameters
    assert kept <= set(model.parameters()), "an optimizer made before goes on"
    if start != "float":
        torch.testing.assert_close(model(MANY).logits, before)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(MANY, labels=MANY).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in experts.parameters())
    y = model(MANY).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(MANY).logits, y)
    assert_same(copy.deepcopy(model), model)
    convert_(model, progress=False)
    packed = model.model.layers[0].mlp.experts
    assert isinstance(packed, OneBitExperts)
    assert packed.symmetric == (options.get("symmetric", False) or start == "symmetric")
    torch.testing.assert_close(model(MANY).logits, y)


def test_experts_of_columns_that_no_group_divides_train():
    model = prepare_qat_(build(moe_intermediate_size=48), group_size=32, progress=False)
    y = model(FEW).logits
    convert_(model, progress=False)
    assert model.model.layers[0].mlp.experts.down_proj.in_features == 48
    torch.testing.assert_close(model(FEW).logits, y)


def test_levels_train_and_the_model_compiles_in_one_graph():
    model = thaw_levels_(onebit())
    loss = model(FEW, labels=FEW).loss
    loss.backward()
    stack = model.model.layers[0].mlp.experts.up_proj
    dense = dequantize_(copy.deepcopy(model))
    dense.zero_grad()
    dense(FEW, labels=FEW).loss.backward()
    grad = (
        dense.model.layers[0].mlp.experts.gate_up_proj.grad[:, 96:].unflatten(-1, (-1, 32)).sum(-1)
    )
    torch.testing.assert_close(stack.biases.grad, grad, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(MANY).logits, model(MANY).logits)


def test_symmetrize_takes_stacks():
    model = onebit(method="sign")
    assert model.model.layers[0].mlp.experts.up_proj.biases is not None
    before = model(FEW).logits
    symmetrize_(model)
    assert model.model.layers[0].mlp.experts.up_proj.biases is None
    torch.testing.assert_close(model(FEW).logits, before)


@pytest.mark.parametrize("symmetric", [False, True])
def test_save_checkpoint_and_load_checkpoint(symmetric, tmp_path):
    model = onebit(symmetric=symmetric)
    save_checkpoint(model, tmp_path)
    for start in (build(), onebit(), None):  # float, 1-bit with others' levels, built by the loader
        again = load_checkpoint(tmp_path, start, symmetrize=symmetric)
        assert_same(model, again)


def test_quantized_on_load_saved_and_loaded_bit_for_bit(tmp_path):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")  # a matrix for each expert: transformers merges them
    config = OneBitConfig(group_size=32, modules_to_not_convert=[])
    options = {"output_loading_info": True}
    load = AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "dense", quantization_config=config, **options)
    assert not any(info.values()), info
    assert_same(model, quantize_(copy.deepcopy(dense), group_size=32, skip=[]))
    model.save_pretrained(tmp_path / "onebit")
    again, info = load(tmp_path / "onebit", **options)
    assert not any(info.values()), info
    assert_same(model, again)
    assert torch.equal(model(FEW).logits, again(FEW).logits)
    again.save_pretrained(tmp_path / "again")
    assert_same(load_checkpoint(tmp_path / "again"), model)


def test_experts_left_float_beside_packed_ones(tmp_path):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    config = OneBitConfig(group_size=32, modules_to_not_convert=["model.layers.1.mlp.experts"])
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=config)
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["OneBitExperts", "Qwen3MoeExperts"]
    model.save_pretrained(tmp_path / "onebit")
    again, info = load(tmp_path / "onebit", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(model, again)


def test_float_experts_in_a_folder_of_mlx(tmp_path):
    model = onebit(skip=["0.mlp.experts"])
    save_checkpoint(model, tmp_path)
    assert_same(load_checkpoint(tmp_path, build()), model)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(loaded, model)
    with pytest.raises(CheckpointError, match="must be of 1 bit in this model, got a dense tensor"):
        load_checkpoint(tmp_path, onebit())
    loaded.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


SAVED = [
    ("save_checkpoint", ()),
    ("save_pretrained", ()),
    ("save_checkpoint", ["0.mlp.experts"]),
    ("save_pretrained", ["0.mlp.experts"]),
]


@pytest.mark.parametrize("how, skip", SAVED)
def test_mlx_lm_reads_what_we_save(how, skip, tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model = onebit(skip=skip)
    if how == "save_checkpoint":
        save_checkpoint(model, tmp_path)
    else:
        attach_quantizer_(model).save_pretrained(tmp_path)
    theirs, _ = load_model(tmp_path)
    for ids in (FEW, MANY):
        logits = torch.from_numpy(np.array(theirs(mx.array(ids.numpy()))))
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)


def test_we_read_what_mlx_lm_saves(tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, save_config

    save_checkpoint(onebit(), tmp_path)  # config.json as they need it
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, _ = load_model(tmp_path)
    router = lambda path, module: hasattr(module, "to_quantized") and not path.endswith("gate")
    mlx.nn.quantize(theirs, group_size=32, bits=1, class_predicate=router)
    config["quantization"] = {"group_size": 32, "bits": 1, "mode": "affine"}
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(theirs.parameters())))
    save_config(config, folder / "config.json")
    logits = torch.from_numpy(np.array(theirs(mx.array(MANY.numpy()))))
    for model in (load_checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(model.model.layers[1].mlp.experts, OneBitExperts)
        torch.testing.assert_close(model(MANY).logits, logits, rtol=0, atol=1e-4)


def test_a_file_that_lacks_a_matrix_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_checkpoint(onebit(), tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "0.mlp.switch_mlp.up_proj" not in n}
    save_file(kept, file)
    lacking = r"model.layers.0.mlp.switch_mlp.gate_proj must have .*up_proj beside it, got none"
    with pytest.raises(CheckpointError, match=lacking):
        load_checkpoint(tmp_path)
    lacking = r"experts.gate_proj must have .*experts.up_proj beside it, got none"
    with pytest.raises(CheckpointError, match=lacking):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_shape_is_refused(tmp_path):
    save_checkpoint(onebit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    shape = r"_proj must have shape \[5, .* as in the model, got \[4, "
    with pytest.raises(CheckpointError, match=shape):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=shape):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe"])
def test_other_mixtures_share_the_interface(kind, tmp_path):
    sizes = {"num_local_experts": 4, "shared_expert_intermediate_size": 64}
    model = quantize_(build(kind, **sizes), group_size=32)
    assert any(isinstance(m, OneBitExperts) for m in model.modules())
    dense = dequantize_(copy.deepcopy(model))
    torch.testing.assert_close(model(FEW).logits, dense(FEW).logits, rtol=0, atol=1e-5)
    attach_quantizer_(model).save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(model, again)


def test_stack_names_what_is_wrong():
    stack = OneBitStack(2, 64, 8, group_size=32)
    with pytest.raises(ValueError, match="weight must have 3 dimensions, got 2"):
        OneBitStack.from_packed(stack.weight[0], stack.scales[0], None, group_size=32)
    with pytest.raises(ValueError, match=r"scales must have shape \[16, 2\], got \[16, 1\]"):
        OneBitStack.from_packed(stack.weight, stack.scales[..., :1], None, group_size=32)
    experts = build(num_hidden_layers=1).model.layers[0].mlp.experts
    with pytest.raises(
        ValueError, match=r"gate_proj must have shape \[4, 96, 64\], got \[2, 8, 64"
    ):
        OneBitExperts(experts, stack, stack, stack)
