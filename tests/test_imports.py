"""Imports go one way, the core needs torch and transformers only, and importing it is quiet and quick to do without the extras."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROAD = ["xlstm_kernels", "configuration", "record", "exact", "joint", "cache", "sparse", "mixers", "modeling", "state", "checks", "verify",
        "families", "teachers", "conversion", "allocation", "distil", "adapters", "export", "data", "store", "plan", "trainers", "pipeline",
        "arena", "doctor", "verbs", "cli"]  # fmt: skip
LEAVES = {"errors": set(), "versions": set(), "artifacts": {"errors"}, "weights": {"artifacts", "errors"}, "tasks": {"errors"},
          "merge_settings": set(), "recipe": {"errors", "merge_settings"}, "claims": {"artifacts"}, "vocabulary": {"errors"}, "footprint": {"errors"},
          "cache_names": {"errors"}, "precision": set(),
          "generation": {"cache_names"}, "compatibility": {"xlstm_kernels", "errors", "generation", "versions"},
          "training_bytes": {"xlstm_kernels"}}  # fmt: skip
SIDE = ["losses", "schedules", "merge_methods", "merging", "statistics", "evaluation", "longcontext", "compare", "search", "efficiency",
        "efficiency_report", "report_sections", "report", "card", "push"]  # fmt: skip
# those of SIDE import leaves and what stands before them here; the road may import them
STAGES = {"trainers", "pipeline", "arena", "verbs", "cli"}  # modules of the road that use the side
EXTRAS = {"trl", "peft", "datasets", "lm_eval", "matplotlib", "accelerate"}
SOURCES = sorted([*(ROOT / "src/xlstm_hybrid").rglob("*.py"), *(ROOT / "kernels/xlstm_kernels").rglob("*.py")])


def module_of(path):
    parts = path.relative_to(ROOT).parts
    return "xlstm_kernels" if parts[0] == "kernels" else parts[2].removesuffix(".py")


def imports(path, top_level_only=False):
    """Imported module names, relative to our package where they are ours."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" if node.module == "xlstm_hybrid" else node.module for alias in node.names)


def ours(path):
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "xlstm_hybrid" and rest:
            yield rest.split(".")[0]
        elif head == "xlstm_kernels":
            yield "xlstm_kernels"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_module_imports_only_what_stands_before_it(path):
    me = module_of(path)
    if me in ("__init__", "__main__"):
        return
    if me in LEAVES:
        allowed = LEAVES[me]
    elif me in SIDE:
        allowed = {*LEAVES, *SIDE[: SIDE.index(me)]}
    else:
        assert me in ROAD, f"{me} has no place in the import order: add it to this test"
        allowed = {*LEAVES, *(SIDE if me in STAGES else ()), *ROAD[: ROAD.index(me)], me}
        allowed |= {"__version__"} if me == "cli" else set()
    assert set(ours(path)) <= allowed, f"{me} imports {set(ours(path)) - allowed}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "trainers" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_extras_are_imported_inside_functions_only(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & EXTRAS


def test_the_kernels_stand_alone():
    allowed = {"torch", "triton", "xlstm_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels/xlstm_kernels").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


def test_no_package_file_shadows_the_hugging_face_kernels_package():
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "tests/__init__.py").exists()


def test_the_package_imports_without_extras_and_registers_itself():
    """A finder that refuses every extra stands for an environment without them; sockets are refused as well."""
    program = f"""
import sys, socket
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {EXTRAS - {"accelerate"}!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
def no_network(*a, **k): raise OSError('no network in this test')
socket.socket.connect = no_network
import xlstm_hybrid
from transformers import AutoConfig
assert AutoConfig.for_model('xlstm_hybrid').sliding_window == 512
assert not set(sys.modules) & {EXTRAS - {"accelerate"}!r}
print('imported', xlstm_hybrid.__version__)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.startswith("imported "), result.stderr
