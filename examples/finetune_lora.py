"""LoRA of PEFT over packed 1-bit weights: train, save the adapter, load it.

    python examples/finetune_lora.py

The base is a tiny Llama, trained for some seconds in float: its text means nothing.
"""

import tempfile
from pathlib import Path

import peft
import torch
from texts import batch_of, loss_of, text_ids, tiny_llama

import torch_onebit
from torch_onebit.peft import onebit_lora

STEPS, BATCH = 60, (8, 64)


def train(model: torch.nn.Module, ids: torch.Tensor, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(STEPS):
        loss = loss_of(model, batch_of(ids, *BATCH, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    ids = text_ids()
    test = batch_of(ids, 32, 64, seed=-1)
    model = tiny_llama()
    train(model, ids, 3e-3)
    print(f"float       {loss_of(model, test):.3f} nats a byte")

    torch_onebit.quantize_(model, group_size=64, skip=["lm_head", "embed_tokens"])
    print(f"1 bit       {loss_of(model, test):.3f}")

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = onebit_lora(peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    adapted = peft.get_peft_model(model, config)
    train(adapted, ids, 3e-3)
    after = loss_of(adapted.eval(), test)
    print(f"with LoRA   {after:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)  # the adapter alone
        size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
        base = adapted.unload()
        config = onebit_lora(peft.PeftConfig.from_pretrained(folder))  # PEFT does not store this
        loaded = peft.PeftModel.from_pretrained(base, folder, config=config).eval()
    assert torch.equal(loss_of(loaded, test), after)
    print(f"saved and loaded: an adapter of {size:,} bytes")


if __name__ == "__main__":
    main()
