"""Folders carry the order of imports, importing the package is quiet and quick, and the core needs torch and
transformers only.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [  # each imports only what stands behind it
    "vllm",
    "cli",
    "commands",
    "doctor",
    "distil_xlstm",
    "pipeline",
    "reports",
    "merging",
    "evaluation",
    "training",
    "planning",
    "hub",
    "serving",
    "teacher_store",
    "data",
    "conversion",
    "state",
    "model",
    "recipe",
    "checkpoint",
    "environment",
    "errors",
]
EXTRAS = {"trl", "peft", "datasets", "lm_eval", "matplotlib", "accelerate"}
PACKAGE, ARENA, KERNELS = ROOT / "src/xlstm_hybrid", ROOT / "src/xlstm_arena", ROOT / "kernels/xlstm_kernels"
SOURCES = sorted(path for folder in (PACKAGE, ARENA, KERNELS) for path in folder.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path, top_level_only=False):
    """Names of imported modules; of `from xlstm_hybrid import x` the name of x, and of `from package import module` the
    module's.
    """
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if node.module == "xlstm_hybrid" or name in MODULES else node.module for name in full)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")


MODULES = {module_name(path) for path in SOURCES}


def rooms(path):
    """The rooms that a module imports from, its own left out."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = (name.split(".")[1] for name in imports(path) if name.startswith("xlstm_hybrid."))
    return own, {room for room in found if room not in (own, "__version__")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_a_room_imports_only_from_rooms_behind_it(path):
    own, used = rooms(path)
    if own in ("__init__", "__main__"):
        return
    assert own in ROOMS, f"{own} has no place in the order of rooms: add it to this test"
    assert used <= set(ROOMS[ROOMS.index(own) + 1 :]), f"{own} imports from {used}"


def test_nothing_but_the_arena_imports_the_arena():
    assert not [
        name_of(path)
        for path in SOURCES
        if ARENA not in path.parents and any(n.startswith("xlstm_arena") for n in imports(path))
    ]


@pytest.mark.parametrize("folder", [PACKAGE, ARENA, KERNELS], ids=name_of)
def test_no_two_modules_import_each_other(folder):
    """Of modules as they are loaded, in functions or not: a circle of any length is named."""
    files = {module_name(path): path for path in folder.rglob("*.py")}
    edges = {name: {used for used in imports(path) if used in files and used != name} for name, path in files.items()}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for used in sorted(edges[name]):
                visit(used)
            done.add(open_.pop())

    for name in sorted(files):
        visit(name)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "training" not in p.parts and p.name != "trainer.py"], ids=name_of
)
def test_extras_are_imported_inside_functions_only(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & EXTRAS


def test_the_kernels_stand_alone():
    allowed = {"torch", "triton", "xlstm_kernels", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
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


def test_every_folder_of_modules_is_a_package_or_a_wheel_would_lack_it():
    folders = {path.parent for path in SOURCES if "lm_eval_tasks" not in path.parts}
    assert not [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]


def reads_or_writes_text(node):
    """Whether a call opens a file as text: `open`, `fdopen` without a binary mode, `read_text`, `write_text`."""
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    if name in ("read_text", "write_text"):
        return True
    own = (
        isinstance(node.func, ast.Name)
        or name == "fdopen"
        or getattr(getattr(node.func, "value", None), "id", "") in ("gzip", "lzma")
    )
    mode = [
        a.value for a in (*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")) if hasattr(a, "value")
    ]
    return name in ("open", "fdopen") and own and "b" not in "".join(map(str, mode))


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "setup.py", *sorted((ROOT / "kernels").glob("*.py"))], ids=name_of)
def test_text_is_read_and_written_in_utf_8_whatever_the_locale(path):
    """ruff's PLW1514 sees some of these calls, and only with --preview."""
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    silent = [n.lineno for n in filter(reads_or_writes_text, calls) if "encoding" not in {k.arg for k in n.keywords}]
    assert silent == [], f'{path.name}, lines {silent}: give encoding="utf-8"'
