"""The package's shape: imports run one way, public names are sorted and documented, an import has one side effect."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import peft_poly

PACKAGE = Path(peft_poly.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
# From the foundation up: a module imports only from rows above its own.
CORE = [
    {"compat", "config", "gradients", "grouping", "initialisation", "states"},
    {"merging", "mixing", "router", "task_ids"},
    {"autograd", "base_layers"},
    {"call_weights", "kept"},
    {"tasks"},
    {"paths"},
    {"layer"},
    {"adaptation", "growth", "sharding", "sharing", "targets"},
    {"choosing"},
    {"verbs"},
    {"model"},
    {"registration"},
]
LAZY = ("matplotlib", "scipy", "typer")  # wanted by plots and the command line only


def imported(node: ast.AST) -> list[str]:
    """What one import statement imports, `peft_poly`'s own modules with a leading dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level:
        return [f".{node.module}"] if node.module else [f".{alias.name}" for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_on_load(module: str) -> set[str]:
    """Everything that loading a module imports: its statements outside of functions and of `if TYPE_CHECKING`."""
    found, pending = set(), list(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        found.update(imported(node))
        if not is_type_checking(node) and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))
    return found


def own_imports(module: str) -> set[str]:
    return {name[1:] for name in imports_on_load(module) if name.startswith(".")}


REPORT = f"""
import json, sys
import huggingface_hub, peft.mapping
from peft.utils import PeftType
from transformers import GenerationMixin, PreTrainedModel

tables = [getattr(peft.mapping, f"PEFT_TYPE_TO_{{name}}_MAPPING") for name in ("CONFIG", "TUNER", "PREFIX")]
before, members, modules = [dict(table) for table in tables], list(PeftType), set(sys.modules)
import peft_poly
print(json.dumps({{
    "optional": [name for name in {LAZY} if name in sys.modules and name not in modules],
    "kept": all(table[key] is value for table, old in zip(tables, before) for key, value in old.items()),
    "added": [[key.value for key in table if key not in old] for table, old in zip(tables, before)],
    "members kept": list(PeftType)[:len(members)] == members,
    "members added": [member.value for member in list(PeftType)[len(members):]],
}}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    """What `import peft_poly` changes in a Python that has imported PEFT and transformers only."""
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestImports:
    @pytest.mark.parametrize("level", range(len(CORE)))
    def test_the_core_imports_one_way(self, level):
        above = set().union(*CORE[:level])
        for module in CORE[level]:
            extra = {"loading", "saving", "trainer"} if module == "registration" else set()
            assert own_imports(module) <= above | extra, module

    def test_no_imports_run_in_a_circle(self):
        graph = {module: own_imports(module) for module in MODULES}
        while graph:
            ready = [module for module, needs in graph.items() if not needs & graph.keys()]
            assert ready, f"these import one another: {sorted(graph)}"
            for module in ready:
                del graph[module]

    def test_the_design_page_lists_every_file_below_those_it_imports(self):
        text = (Path(__file__).parent.parent / "docs/design.md").read_text(encoding="utf-8")
        table = text.partition("<!-- files -->")[2].partition("<!-- /files -->")[0]
        listed = re.findall(r"^\| `(\w+)\.py` \| \S", table, re.MULTILINE)
        assert sorted(listed) == sorted(path.stem for path in PACKAGE.glob("*.py"))
        for place, module in enumerate(listed):
            assert module.startswith("__") or own_imports(module) <= set(listed[:place]), module

    def test_every_own_import_is_relative_and_exists(self):
        for module in MODULES:
            assert own_imports(module) <= set(MODULES), module
            assert not [name for name in imports_on_load(module) if name.startswith("peft_poly")], module

    @pytest.mark.parametrize("module", ["__init__", *MODULES])
    def test_plotting_and_scipy_wait_until_they_are_used(self, module):
        assert not {name.partition(".")[0] for name in imports_on_load(module)} & {"matplotlib", "scipy"}

    def test_the_package_does_not_load_its_command_line(self):
        loaded, pending = set(), own_imports("__init__")
        while pending:
            module = pending.pop()
            loaded.add(module)
            pending |= own_imports(module) - loaded
        assert "cli" not in loaded
        assert not [module for module in loaded if "typer" in imports_on_load(module)]

    def test_importing_the_package_loads_no_optional_package(self, fresh_import):
        assert fresh_import["optional"] == []

    def test_no_module_is_called_utils(self):
        assert not list(PACKAGE.rglob("*util*"))
        assert not list(PACKAGE.rglob("*helper*"))


class TestPeftStaysAsItWas:
    def test_the_entries_of_pefts_own_poly_are_its_own(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.POLY] is peft.PolyConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.POLY] is peft.PolyModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.POLY] == "poly_"
        assert peft.PolyConfig.__module__ == "peft.tuners.poly.config"
        assert peft.PolyConfig().peft_type == "POLY"

    def test_importing_adds_one_method_and_changes_no_other(self, fresh_import):
        assert fresh_import["kept"]
        assert fresh_import["members kept"]
        assert fresh_import["added"] == [["PEFT_POLY"]] * 3
        assert fresh_import["members added"] == ["PEFT_POLY"]

    def test_the_registered_entries_are_ours(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PEFT_POLY] is peft_poly.PolyConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PEFT_POLY] is peft_poly.PolyModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PEFT_POLY] == peft_poly.PolyModel.prefix == "poly_"


def public_objects(module: str) -> list[tuple[str, object]]:
    """The classes and functions of a module's `__all__`, and the methods and properties that its classes define."""
    found, loaded = [], importlib.import_module(f"peft_poly.{module}")
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            found.append((name, thing))
        if inspect.isclass(thing):
            members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
            kinds = (staticmethod, classmethod, property)
            found += [
                (f"{name}.{key}", value)
                for key, value in members.items()
                if inspect.isfunction(value) or isinstance(value, kinds)
            ]
    return found


def public_functions(module: str) -> list[tuple[str, object]]:
    """The functions that a public module offers, and the methods that its classes define, but for those of layers.

    A layer's methods are PEFT's, under PEFT's names.
    """
    loaded, found = importlib.import_module(module), []
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if inspect.isclass(thing) and not issubclass(thing, peft_poly.PolyLayer):
            ours = [base for base in thing.__mro__ if base.__module__.startswith("peft_poly")]
            methods = {key: value for base in reversed(ours) for key, value in vars(base).items()}
            found += [
                (f"{name}.{key}", method)
                for key, method in methods.items()
                if inspect.isfunction(method) and not key.startswith("_") and key != "extra_repr"
            ]
        elif inspect.isfunction(thing):
            found.append((name, thing))
    return found


class TestPublicNames:
    @pytest.mark.parametrize("module", ["", *(f".{module}" for module in MODULES)])
    def test_all_is_sorted_and_names_what_exists(self, module):
        loaded = importlib.import_module(f"peft_poly{module}")
        assert list(loaded.__all__) == sorted(set(loaded.__all__))
        assert not [name for name in loaded.__all__ if not hasattr(loaded, name)]

    @pytest.mark.parametrize("module", ["__init__", *MODULES])
    def test_every_module_says_what_it_is_for(self, module):
        assert ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))

    @pytest.mark.parametrize("module", MODULES)
    def test_every_public_name_has_a_docstring_of_its_own(self, module):
        undocumented = [name for name, thing in public_objects(module) if not (vars_doc(thing) or "").strip()]
        assert not undocumented

    @pytest.mark.parametrize("module", ["peft_poly", "peft_poly.analysis", "peft_poly.plots", "peft_poly.report"])
    def test_a_public_function_documents_its_parameters_and_the_errors_that_it_raises_itself(self, module):
        thin = []
        for name, function in public_functions(module):
            text = function.__doc__
            given = set(inspect.signature(function).parameters) - {"self", "adapter_name", "args", "kwargs"}
            errors = re.findall(r"^ +raise (\w+Error)", inspect.getsource(inspect.unwrap(function)), re.MULTILINE)
            thin += [f"{name}: {word}" for word in (*given, *errors) if not re.search(rf"\b{word}\b", text)]
        assert not thin

    @pytest.mark.parametrize("module", MODULES)
    def test_the_examples_in_the_docstrings_run(self, module):
        loaded = importlib.import_module(f"peft_poly.{module}")
        assert doctest.testmod(loaded, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0

    def test_the_package_offers_the_names_of_pefts_own_poly(self):
        assert {"Linear", "PolyConfig", "PolyLayer", "PolyModel", "PolyRouter", "Router", "get_router"} <= set(
            peft_poly.__all__
        )

    def test_the_package_is_marked_as_typed(self):
        assert (PACKAGE / "py.typed").exists()


def vars_doc(thing: object) -> str | None:
    """An object's own docstring: a class does not inherit the one of its base."""
    return vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
