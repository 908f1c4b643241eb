"""PEFT without `peft_poly`, in a process of its own: `python peft_steps.py REQUESTS.json ANSWERS.json`.

All exported tasks are loaded into one model, and the rows of a batch have the LoRAs of their tasks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PREFIX = "task_"  # a name such as `double` or `train` is an attribute of a module, and no adapter can have it


@torch.inference_mode()
def main(source: Path, target: Path) -> None:
    wanted = json.loads(source.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(wanted["base"])
    base = AutoModelForCausalLM.from_pretrained(wanted["base"], dtype=torch.float32)
    (first, folder), *others = wanted["loras"].items()
    model = peft.PeftModel.from_pretrained(base, folder, adapter_name=PREFIX + first)
    for task, folder in others:
        model.load_adapter(folder, adapter_name=PREFIX + task)
    model.eval()
    answers = []
    for start in range(0, len(wanted["requests"]), 20):
        part = wanted["requests"][start : start + 20]
        batch = tokenizer.pad({"input_ids": [one["prompt"] for one in part]}, padding_side="left", return_tensors="pt")
        names = [PREFIX + one["task"] for one in part]
        made = model.generate(**batch, adapter_names=names, max_new_tokens=wanted["new"], do_sample=False)
        answers += made[:, batch["input_ids"].shape[1] :].tolist()
    assert "peft_poly" not in sys.modules
    target.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
