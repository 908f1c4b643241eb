"""What users do with the Hub, each step in a process of its own: `python hub_steps.py push|load|without FOLDER`.

The client reads the Hub's address when it is imported. Results go to FOLDER, for `integration/test_hub.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

TASKS = ["rte", "sst2", "boolq"]
ADAPTER, BASE, LORA = "user/adapter", "user/base", "user/lora"
INPUTS = {"input_ids": torch.arange(3, 18).view(3, 5)}


def push(folder: Path) -> None:
    """Push an adapter, edit its card as on the web site, train on, push again; to a branch too; then a LoRA."""
    import peft
    from huggingface_hub import HfApi
    from transformers import LlamaForCausalLM

    from peft_poly import PolyConfig

    torch.manual_seed(0)
    config = PolyConfig(task_type="CAUSAL_LM", r=2, n_splits=2, task_names=TASKS, init_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config).eval()
    outputs = {}
    train(model)
    info = model.push_to_hub(ADAPTER, private=True, tags=["finance"])
    outputs[info.oid] = model(**INPUTS, task_ids=TASKS).logits.detach()

    card = Path(HfApi().hf_hub_download(ADAPTER, "README.md")).read_text()
    card = card.replace("# Task-routed adapter", "# Bank letters\n\nSorts letters.").replace(
        "tags:\n", "tags:\n- bank\n"
    )
    HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=ADAPTER)

    train(model)
    model.push_to_hub(ADAPTER, commit_message="Trained on", commit_description="With more letters.")
    outputs["main"] = model(**INPUTS, task_ids=TASKS).logits.detach()
    model.push_to_hub(ADAPTER)  # nothing has changed
    train(model)
    for _ in range(2):  # the second time the branch is there
        model.push_to_hub(ADAPTER, revision="dev", safe_serialization=True)
    outputs["dev"] = model(**INPUTS, task_ids=TASKS).logits.detach()
    torch.save(outputs, folder / "pushed.pt")
    push_lora(LORA)


def train(model: Any) -> None:
    """Other weights than before."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def push_lora(repo: str) -> None:
    """What a user of another method does in a process that has, or has not, imported peft_poly."""
    import peft
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config).push_to_hub(repo, tags=["finance"])


def load(folder: Path) -> None:
    """Load what was pushed, in every way there is."""
    import peft
    from transformers import LlamaForCausalLM

    import peft_poly

    loaded = {}
    for revision in torch.load(folder / "pushed.pt"):
        base = LlamaForCausalLM.from_pretrained(BASE)
        loaded[revision] = peft.PeftModel.from_pretrained(base, ADAPTER, revision=revision)
    base = LlamaForCausalLM.from_pretrained(BASE)
    loaded["no revision"] = peft.PeftModel.from_pretrained(base, ADAPTER)
    loaded["auto"] = peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER)
    outputs = {name: model(**INPUTS, task_ids=TASKS).logits.detach() for name, model in loaded.items()}
    names: dict[str, Any] = {"inputs": INPUTS}
    exec((folder / "loading_lines.py").read_text().replace("...", ADAPTER), names)
    outputs["card"] = names["outputs"].logits.detach()
    torch.save(outputs, folder / "loaded.pt")

    config = peft.PeftConfig.from_pretrained(ADAPTER)
    assert type(config) is peft_poly.PolyConfig
    kept = {name: getattr(config, name) for name in ("r", "n_splits", "task_names", "base_model_name_or_path")}
    (folder / "config.json").write_text(json.dumps(kept))


def without(folder: Path) -> None:
    """The same in a process that has not imported peft_poly."""
    import peft
    from transformers import LlamaForCausalLM

    try:
        peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(BASE), ADAPTER)
    except KeyError as error:
        (folder / "error.txt").write_text(repr(error))
    push_lora(f"{LORA}-before")
    assert "peft_poly" not in sys.modules


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"push": push, "load": load, "without": without}[sys.argv[1]](Path(sys.argv[2]))
