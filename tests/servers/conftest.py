"""One adapter of a real chat model for all engines, its tasks exported."""

from __future__ import annotations

import peft
import pytest
from environments import folder
from exported import PROMPTS, Exported, adapter_folder, greedy_of_ours


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Exported:
    root = folder()
    pytest.importorskip("gguf")
    from assistant_data import rows_of
    from assistants import load
    from smollm2 import unpacked

    base = unpacked(root / "smollm2")
    plain, tokenizer = load(base)
    model = peft.PeftModel.from_pretrained(plain, adapter_folder(root)).eval()
    loras = model.export_lora(None, tmp_path_factory.mktemp("loras") / "all")
    by_task = {task: rows_of([task], "test")[:PROMPTS] for task in model.task_names}
    rows = [by_task[task][number] for number in range(PROMPTS) for task in by_task]  # tasks in turn
    template = {"add_generation_prompt": True, "return_dict": True}
    requests = [
        {"task": row["task"], "prompt": tokenizer.apply_chat_template(row["prompt"], **template)["input_ids"]}
        for row in rows
    ]
    wanted = greedy_of_ours(model, tokenizer, requests)
    return Exported(rows, tokenizer, base, loras, requests, wanted, tokenizer.eos_token_id, model)
