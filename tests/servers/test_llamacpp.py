"""llama.cpp answers with the tokens of `model.generate`: the same weights as GGUF, an exported task as a LoRA of it.

On the package's own file (Q4_1) its products round the activations to eight bits, so that the share of equal answers
is printed and not asserted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import llama_cpp_sources, python_of, run
from exported import NEW_TOKENS, PROMPTS, TIE
from smollm2 import packed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def loras(exported, tmp_path_factory) -> dict[str, str]:
    """A GGUF file of each task's LoRA."""
    folder, script = tmp_path_factory.mktemp("gguf"), llama_cpp_sources() / "convert_lora_to_gguf.py"
    found = {}
    for task, path in exported.loras.items():
        found[task] = str(folder / f"{task}.gguf")
        what = ["--outtype", "f32", path, "--base", exported.base, "--outfile", found[task]]
        run(python_of("llamacpp"), script, *what)
    return found


def answers(exported, base: Path, loras: dict[str, str], folder: Path) -> list[list[int]]:
    source, target = folder / "requests.json", folder / "answers.json"
    asked = {"base": str(base), "loras": loras, "requests": exported.requests, "new": NEW_TOKENS}
    source.write_text(json.dumps({**asked, "end": exported.end, "threads": 1}), encoding="utf-8")
    run(python_of("llamacpp"), Path(__file__).with_name("llamacpp_steps.py"), source, target)
    return json.loads(target.read_text(encoding="utf-8"))


def test_llamacpp_answers_with_our_tokens(exported, loras, tmp_path, record_property, capsys):
    base = tmp_path / "smollm2.gguf"
    script = llama_cpp_sources() / "convert_hf_to_gguf.py"
    run(python_of("llamacpp"), script, "--outtype", "f32", exported.base, "--outfile", base)
    found = answers(exported, base, loras, tmp_path)
    with capsys.disabled():
        print("\n", json.dumps({**exported.requests[0], "answer": found[0]}))
        equal = exported.compare(found, "llama.cpp, F32", record_property)
    assert all(abs(tie["ours"] - tie["theirs"]) < TIE for tie in exported.ties)
    assert sum(equal.values()) + len(exported.ties) == PROMPTS * len(exported.loras)


def test_on_the_quantised_file_itself_most_answers_are_equal(exported, loras, tmp_path, record_property, capsys):
    found = answers(exported, packed(), loras, tmp_path)
    equal = sum(got == wanted for got, wanted in zip(found, exported.wanted, strict=True))
    record_property("llama.cpp, Q4_1", f"{equal}/{len(found)}")
    with capsys.disabled():
        print(f"\nllama.cpp, Q4_1: {equal} of {len(found)} answers are equal")
        print(f"right to the letter: {exported.right(exported.wanted):.1f} % here, {exported.right(found):.1f} % there")
    assert equal > 0
