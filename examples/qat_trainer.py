"""1-bit training with transformers' Trainer: the bits and the levels are trained, then packed.

    python examples/qat_trainer.py

The model is a tiny Llama that starts from random weights.
"""

import argparse
import tempfile

import torch
import transformers
from texts import batch_of, loss_of, text_ids, tiny_llama

import torch_onebit
from torch_onebit.transformers import attach_quantizer_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    ids = text_ids()
    data = [{"input_ids": row, "labels": row} for row in batch_of(ids, 8 * steps, 64, seed=0)]
    test = batch_of(ids, 32, 64, seed=-1)

    model = tiny_llama()
    torch_onebit.prepare_qat_(model, group_size=64, skip=["lm_head", "embed_tokens"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        groups = torch_onebit.parameter_groups(model, weight_decay=0.0, lr=3e-3)
        optimizers = (torch.optim.AdamW(groups), None)
        print(f"before      {loss_of(model, test):.3f} nats a byte")
        transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=optimizers
        ).train()
        model.eval()
        print(f"trained     {loss_of(model, test):.3f}")

        torch_onebit.convert_(model)  # packs what was trained
        packed = loss_of(model, test)
        print(f"packed      {packed:.3f}")
        attach_quantizer_(model).save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loss_of(loaded, test), packed)
    print(torch_onebit.report(model))
    print("saved and loaded, bit for bit")


if __name__ == "__main__":
    main()
