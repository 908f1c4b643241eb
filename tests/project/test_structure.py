"""The package's shape: imports run one way, public names are sorted and documented, an import has one side effect."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import peft_poly

ROOT = Path(__file__).parents[2]
PACKAGE = Path(peft_poly.__file__).parent
# From the ground up: what stands in a row imports from the rows before it, and from its own wing.
FLOORS = [
    {"labels", "recommended"},
    {"config", "compat"},
    {"router"},
    {"tasks"},
    {"compute"},
    {"layer"},
    {"adapter"},
    {"checkpoints"},
    {"verbs"},
    {"model"},
    {"pipelines", "training", "insight"},
    {"registration"},
    {"compare"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
MOST_ROOMS = 10  # modules in one folder
LAZY = ("matplotlib", "scipy", "typer")  # wanted by plots and the command line only


def module_of(path: Path) -> str:
    """`tasks.context` for `tasks/context.py`, `tasks` for `tasks/__init__.py`, `__init__` for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [module for module in FILES if module not in ("__init__", "__main__")]
WINGS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
FOLDERS = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]


def wing_of(module: str) -> str:
    return module.partition(".")[0]


def statements(module: str, everywhere: bool) -> list[ast.stmt]:
    """The import statements of a module: all of them, or those that loading it runs."""
    found, pending = [], list(ast.parse(FILES[module].read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif everywhere or not (is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending.extend(ast.iter_child_nodes(node))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str, everywhere: bool = True) -> set[str]:
    """What a module imports: own modules as `.tasks.context`, others by their whole name."""
    found: set[str] = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    package = "" if package == "__init__" else package
    for node in statements(module, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif not node.level:
            found.add(node.module)
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add("." + (inner if inner in FILES else base or "__init__"))
    return found


def own_imports(module: str, everywhere: bool = True) -> set[str]:
    return {name[1:] for name in imports(module, everywhere) if name.startswith(".")}


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


class TestTheHouse:
    def test_every_room_stands_on_a_floor(self):
        assert {wing_of(module) for module in FILES} == set().union(*FLOORS)

    @pytest.mark.parametrize("floor", range(len(FLOORS)))
    def test_imports_run_one_way(self, floor):
        below = set().union(*FLOORS[:floor])
        for module in FILES:
            if wing_of(module) in FLOORS[floor]:
                reached = {wing_of(name) for name in own_imports(module)}
                assert reached <= below | {wing_of(module)}, module

    def test_no_file_imports_another_in_a_circle_not_even_for_its_types(self):
        # a wing's face hands names on: what imports the wing imports what stands behind it
        graph = {module: own_imports(module) - {module} for module in FILES}
        while graph:
            ready = [module for module, needs in graph.items() if not needs & graph.keys()]
            assert ready, f"these import one another: {sorted(graph)}"
            for module in ready:
                del graph[module]

    def test_no_room_is_imported_through_the_face_of_its_own_wing(self):
        for module in FILES:
            wing = wing_of(module)
            assert module == wing or wing not in own_imports(module), module

    def test_a_folder_holds_a_handful_of_rooms(self):
        for folder in FOLDERS:
            rooms = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
            assert len(rooms) <= MOST_ROOMS, folder

    def test_tests_mirror_the_source(self):
        wings = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
        assert set(WINGS) <= wings
        for wing in WINGS:
            tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / wing).glob("test_*.py")}
            rooms = {name.rpartition(".")[2] for name in FILES if wing_of(name) == wing}
            assert tested & rooms, wing

    def test_the_design_page_says_what_every_floor_is_for(self):
        text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
        floors = {f"{name}/" if name in WINGS else f"{name}.py" for name in set().union(*FLOORS)}
        listed = set(re.findall(r"^\| `([\w/.]+)` \| \S", text, re.MULTILINE))
        assert listed == floors - {"__init__.py", "__main__.py"}

    def test_every_file_that_the_design_page_names_exists(self):
        text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
        named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
        assert named
        assert not [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()]

    def test_the_picture_of_the_house_is_what_its_script_draws(self):
        images = ROOT / "docs/images"
        drawn = runpy.run_path(str(images / "the_house.py"))["draw"]()
        assert drawn + "\n" == (images / "the-house.svg").read_text(encoding="utf-8"), (
            "run: python docs/images/the_house.py > docs/images/the-house.svg"
        )


class TestImports:
    def test_every_own_import_is_relative_and_exists(self):
        for module in FILES:
            assert own_imports(module) <= set(FILES), module
            beside = {"peft_poly_cli"} if module == "__main__" else set()  # the grammar of the command line
            assert {name for name in imports(module) if name.startswith("peft_poly")} <= beside, module

    @pytest.mark.parametrize("module", list(FILES))
    def test_plotting_and_scipy_wait_until_they_are_used(self, module):
        loaded = {name.partition(".")[0] for name in imports(module, everywhere=False)}
        assert not loaded & {"matplotlib", "scipy"}

    def test_the_package_does_not_load_its_command_line(self):
        loaded, pending = set(), own_imports("__init__", everywhere=False)
        while pending:
            module = pending.pop()
            loaded.add(module)
            pending |= own_imports(module, everywhere=False) - loaded
        assert "cli" not in {wing_of(module) for module in loaded}
        assert not [module for module in loaded if "typer" in imports(module, everywhere=False)]

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

    @pytest.mark.parametrize("module", list(FILES))
    def test_every_module_says_what_it_is_for(self, module):
        assert ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8")))

    @pytest.mark.parametrize("module", MODULES)
    def test_every_public_name_has_a_docstring_of_its_own(self, module):
        things = ((name, thing) for name, thing in public_objects(module) if get_origin(thing) is None)  # no aliases
        undocumented = [name for name, thing in things if not (vars_doc(thing) or "").strip()]
        assert not undocumented

    @pytest.mark.parametrize("module", ["peft_poly", "peft_poly.insight", "peft_poly.training"])
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
