"""Registration: the method is known to PEFT, nothing else of PEFT changes, and an unfit PEFT is refused by name."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapters import adapt, poly
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from tiny import CASES, first, t5

import peft_poly
from peft_poly import compat, registration

HERE = Path(__file__).parent
HARNESS = """
import json, os, sys
import peft, tiny, torch, transformers

assert "peft_poly" not in sys.modules
for name, script in json.load(sys.stdin).items():
    if os.fork() == 0:  # PEFT is imported once, each script starts from there
        exec(compile(script, name, "exec"), {"__name__": name})
        sys.stdout.flush()
        os._exit(0)
    status = os.wait()[1]
    assert status == 0, (name, status)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each script prints in a process of its own, where importing, reloading and deleting harm nobody."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps({"others": OTHERS, "reload": RELOAD, "unfit": UNFIT, "late": LATE}),
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


# ------------------------------------------------------------------------------------------------------ registered
def test_the_method_is_registered_with_peft():
    peft_type = PeftType["PEFT_POLY"]
    assert peft_type.value == "PEFT_POLY"
    assert PeftType("PEFT_POLY") is peft_type
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is peft_poly.PolyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is peft_poly.PolyModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == "poly_"


def test_pefts_own_poly_is_registered_as_before():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.POLY] is peft.PolyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.POLY] is peft.PolyModel
    assert peft.PolyConfig is not peft_poly.PolyConfig


def test_registering_again_wraps_nothing_twice():
    before = peft.PeftModelForSeq2SeqLM.forward
    original = getattr(before, registration.MARK)
    for _ in range(3):
        compat.add_peft_type()
        registration.register()
    after = peft.PeftModelForSeq2SeqLM.forward
    assert getattr(after, registration.MARK) is original
    assert not hasattr(original, registration.MARK)
    assert [member for member in PeftType.__members__ if member == "PEFT_POLY"] == ["PEFT_POLY"]


# ------------------------------------------------------------------------------------------------- other methods
OTHERS = """
import inspect, sys
import peft, torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from tiny import CASES, first
from transformers import GenerationMixin

classes = {peft.PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}
methods = ["forward", "generate", "save_pretrained", "push_to_hub", "create_or_update_model_card", "get_base_model"]
doors = [(c, n) for c in classes for n in methods if hasattr(c, n)] + [(GenerationMixin, "generate")]

def signatures():
    methods = [getattr(c, n) for c, n in doors]
    return [(str(inspect.signature(m)), m.__doc__, m.__qualname__) for m in methods]

def make(kind, case):
    torch.manual_seed(0)
    common = dict(task_type=CASES[case].task_type, target_modules=CASES[case].target_modules, r=4)
    if kind == "lora":
        config = peft.LoraConfig(init_lora_weights=False, **common)
    else:
        config = peft.PolyConfig(init_weights=False, n_tasks=3, n_skills=2, n_splits=2, **common)
    return peft.get_peft_model(CASES[case].make(), config).eval()

def outputs(models):
    results = []
    for (kind, case), model in models.items():
        ids = {} if kind == "lora" else {"task_ids": torch.tensor([2, 0, 1])}
        inputs = CASES[case].inputs()
        if kind == "lora" or case != "mlp":  # PEFT's Poly cannot take ids without a task type
            results.append(first(model(**inputs, **ids)))
        if case != "mlp":
            inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
            results.append(model.generate(**inputs, **ids, max_new_tokens=4, do_sample=False))
        if kind == "lora" and case != "mlp":
            results.append(model.generate(**inputs, num_beams=2, max_new_tokens=4, do_sample=False))
    return results

kinds = [("lora", "t5"), ("lora", "llama"), ("lora", "mlp"), ("poly", "t5"), ("poly", "llama")]
models = {key: make(*key) for key in kinds}
before, signed = outputs(models), signatures()
members, poly = list(peft.PeftType), (peft.PolyConfig, peft.PolyModel)
import peft_poly
import peft_poly as again
assert again is peft_poly
assert signatures() == signed
assert [m for m in peft.PeftType if m.value != "PEFT_POLY"] == members
assert (peft.PolyConfig, peft.PolyModel) == poly
for models_now in (models, {key: make(*key) for key in kinds}):
    after = outputs(models_now)
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before))
print("others: untouched")
"""


def test_other_methods_compute_the_same_before_and_after_the_import(printed):
    assert printed["others"] == "untouched"


# ----------------------------------------------------------------------------------------------------------- reload
RELOAD = """
import importlib, multiprocessing, pkgutil, sys
import peft, torch
import peft_poly
from adapters import adapt
from tiny import MLP

x, ids = torch.randn(3, 5, 16), [2, 0, 1]

def make():
    import peft_poly

    torch.manual_seed(0)
    config = peft_poly.PolyConfig(target_modules=["lin0", "lin1"], n_tasks=3, n_splits=2, init_weights=False)
    return adapt(MLP(), config)

def outputs(model):
    import peft_poly

    results = [model(x, task_ids=ids)]
    with model.use_task(ids):
        results.append(model(x))
    model.set_task(1)
    results.append(model(x))
    model.set_task(None)
    return torch.stack(results)

old = make()
before = outputs(old)

def check(what):
    for model in (old, make()):
        assert torch.equal(outputs(model), before), what

def alone(name):
    importlib.reload(importlib.import_module(name))
    check(name)

def in_order(names):
    for name in names:
        importlib.reload(sys.modules[name])
    assert torch.equal(outputs(make()), before)

importlib.reload(peft_poly)
check("the package")
importlib.reload(peft_poly)
check("the package, twice")

names = [m.name for m in pkgutil.iter_modules(peft_poly.__path__, "peft_poly.") if not m.name.endswith("__main__")]
fork = multiprocessing.get_context("fork")
imported = [n for n in sys.modules if n.startswith("peft_poly.")]  # in the order in which they need each other
for target, args in [(alone, (n,)) for n in names] + [(in_order, ([*imported, "peft_poly"],))]:
    process = fork.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0, args

for name in [n for n in sys.modules if n.split(".")[0] == "peft_poly"]:
    del sys.modules[name]
import peft_poly
assert torch.equal(outputs(make()), before)
assert torch.equal(old(x, task_ids=ids), before[0])
print("reloaded:", len(names))
"""


def test_models_work_after_the_package_or_any_module_is_reloaded(printed):
    assert int(printed["reloaded"]) >= 10


# ------------------------------------------------------------------------------------------------------ the Trainer
LATE = """
import sys, tempfile
import peft, peft_poly, tiny

assert "transformers.trainer" not in sys.modules  # nor what it brings: who does not train can do without
model = peft.get_peft_model(tiny.llama(), peft_poly.PolyConfig(task_type="CAUSAL_LM", n_tasks=3))
from transformers import Trainer, TrainingArguments  # only now

row = {"input_ids": [3, 4], "labels": [3, 4], "task_ids": 2, "note": "of no use"}
arguments = TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True, dataloader_pin_memory=False)
batch = next(iter(Trainer(model, arguments, train_dataset=[row]).get_train_dataloader()))
print("late:", sorted(batch), batch["task_ids"].tolist())
methods = [getattr(Trainer, name)._peft_poly_wraps for name in ("_remove_unused_columns", "evaluation_loop")]
print("wrapped:", not any(hasattr(method, "_peft_poly_wraps") for method in methods))
"""


def test_a_trainer_that_is_imported_after_the_model_was_made_keeps_the_column(printed):
    assert printed["late"] == "['input_ids', 'labels', 'task_ids'] [2]"
    assert printed["wrapped"] == "True"


# --------------------------------------------------------------------------------------------------- unfit PEFT
UNFIT = """
import peft
from peft.tuners import tuners_utils

del tuners_utils.BaseTuner.inject_adapter, tuners_utils.check_adapters_to_merge
try:
    import peft_poly
except ImportError as error:
    print("refused:", error)
print("registered:", "PEFT_POLY" in peft.PeftType.__members__)
"""


def test_a_peft_without_what_we_stand_on_is_refused_at_import(printed):
    missing = "peft.tuners.tuners_utils.BaseTuner.inject_adapter, peft.tuners.tuners_utils.check_adapters_to_merge"
    assert printed["refused"] == (
        f"peft_poly works with {compat.PEFT_VERSIONS}, but found peft {peft.__version__}, which has no {missing}. "
        f"Run: pip install '{compat.PEFT_VERSIONS}'"
    )
    assert printed["registered"] == "False"


@pytest.mark.parametrize(
    ("module", "name"),
    [("peft.utils", "no_such_function"), ("peft.no_such_module", "X"), ("peft.peft_model", "PeftModel.no_such_method")],
)
def test_whatever_is_missing_is_named(monkeypatch, module, name):
    monkeypatch.setattr(compat, "FOOTING", {**compat.FOOTING, module: (name,)})
    with pytest.raises(ImportError, match=rf"peft>=.* which has no {module}\.{name}\. Run: pip install 'peft>="):
        compat.check_peft()


def test_this_peft_is_fit():
    compat.check_peft()


def test_all_that_the_package_takes_from_inside_peft_is_checked_at_import():
    checked = {(module, name.split(".")[0]) for module, names in compat.FOOTING.items() for name in names}
    for path in Path(compat.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft."):
                taken = {(node.module, alias.name) for alias in node.names}
                assert taken <= checked, f"{path.name} takes {taken - checked}, which compat.FOOTING leaves out"


# ------------------------------------------------------------------------------------------------------------ calls
def test_an_adapter_is_put_in_and_loaded_without_a_warning_of_what_peft_does(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        adapt(CASES["llama"].make(), poly("llama")).save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(CASES["llama"].make(), tmp_path)


def test_task_ids_can_be_passed_by_position():
    model = adapt(t5(), poly("t5"))
    inputs = CASES["t5"].inputs()
    ids = torch.tensor([2, 0, 1])
    names = list(inspect.signature(peft.PeftModelForSeq2SeqLM.forward).parameters)[1:]
    arguments = [ids if name == "task_ids" else inputs.get(name) for name in names[: names.index("task_ids") + 1]]
    assert torch.equal(first(model(*arguments)), first(model(**inputs, task_ids=ids)))
    assert not torch.allclose(first(model(**inputs, task_ids=ids)), first(model(**inputs, task_ids=0)), atol=1e-3)


@pytest.mark.parametrize("door", ["forward", "generate"])
def test_adapter_names_are_refused(door):
    model = adapt(t5(), poly("t5"))
    inputs = CASES["t5"].inputs()
    call = model if door == "forward" else model.generate
    with pytest.raises(
        ValueError, match="`adapter_names` is for LoRA; the rows of a task-routed adapter take `task_ids`"
    ):
        call(**inputs, adapter_names=["default"] * 3, task_ids=0)


def test_a_transformers_that_wants_another_peft_says_what_else_to_call(monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    model = t5()
    with pytest.raises(
        ValueError, match=r"wants PEFT 99\.0 .*`peft\.inject_adapter_in_model\(config, model\)`"
    ) as caught:
        model.add_adapter(poly("t5"))
    assert "peft>=0.21" in str(caught.value)
    peft.inject_adapter_in_model(poly("t5"), model)
