"""A checkpoint that carries its code, so that `trust_remote_code=True` loads it where this package is not installed.

transformers looks for code beside config.json, in one folder: it follows `from .x import y` from file to file and knows
no sub-packages. So every module that the model needs becomes one flat file, written from our source: its imports become
relative, triton's are guarded, and operators are registered under the name of the file, as torch knows an operator once
per process and several copies may live in one. Nothing else changes.
"""

import ast
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.dynamic_module_utils import get_relative_import_files

from xlstm_hybrid.checkpoint.files import (
    INDEX,
    MANIFEST,
    PROVENANCE,
    add_provenance,
    contained,
    read_json,
    staged,
    verify_files,
    weight_files,
    write_file,
    write_json,
    write_manifest,
)
from xlstm_hybrid.checkpoint.weights import copy_settings, settings_files, using_cache, weight_faults
from xlstm_hybrid.environment.versions import PACKAGES
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError
from xlstm_hybrid.model.configuration import XLSTMHybridConfig

OURS = ("xlstm_hybrid", "xlstm_kernels")
OPERATORS = "xlstm_kernels::"  # how names of torch operators of ours begin
# names as transformers' own models have them
CONFIGURATION, MODELING = "configuration_xlstm_hybrid", "modeling_xlstm_hybrid"
NAMED = {"xlstm_hybrid.model.configuration": CONFIGURATION, "xlstm_hybrid.model.modeling": MODELING}
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.XLSTMHybridConfig",
    "AutoModel": f"{MODELING}.XLSTMHybridModel",
    "AutoModelForCausalLM": f"{MODELING}.XLSTMHybridForCausalLM",
}
# beside weights, configuration and tokenizer
CARRIED = re.compile(r"README\.md|[\w-]+\.png|(LICENSE|NOTICE|USE_POLICY)(\.txt|\.md)?")
HEADER = """\
# Part of xlstm-hybrid {version}, written by `xlstm-hybrid export` from {source}: imports and names of operators are
# this folder's, nothing else differs. Licence of this file: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0.
"""
TRITON = """\
try:  # on a GPU only: nothing imports this file before a tensor is there
{imports}
except ImportError as error:
    raise ImportError("the GPU kernels need triton: pip install triton") from error
"""
LOADING = """\
## Load it without the package

This checkpoint carries the code of its architecture, {count} Python files beside the weights. Read them, then:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint = "."  # this directory, or its id on the Hub; on the Hub name a commit as well: revision="..."
tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
```

It needs {needs}. With `pip install xlstm-hybrid` and `import xlstm_hybrid` the package's code runs and this code is not used.
"""
NEEDS = f"torch {PACKAGES['torch'].floor} and transformers {PACKAGES['transformers'].floor} or newer"


@dataclass
class ExportReport:
    """files: names of what was written.  code: those with code.  left_out: names in the checkpoint that do not travel,
    pickles among them.
    """

    files: list
    code: list
    left_out: list

    def __str__(self):
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{len(self.files)} files, of these {len(self.code)} with code{left}"


# --- code as flat files ------------------------------------------------------------------------------------------


def file_name(module):
    """Name of the file, without .py, that a module of ours becomes."""
    return NAMED.get(module, module.replace(".", "_"))


@cache
def origin(module):
    """The file of a module of ours, or None if there is no such module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent is no package
        return None
    return spec and Path(spec.origin)


@cache
def defined_in(package):
    """{name: module} of what a package's `__init__` imports from its own modules."""
    tree = ast.parse(origin(package).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imported(node):
    """What `from module import names` takes from where: [(module, name or None for the module itself, its name here)]."""
    names = []
    for alias in node.names:
        module, name = node.module, alias.name
        # first: xlstm_kernels.mix is the function, which hides the folder of its name
        if origin(module).name == "__init__.py" and name in defined_in(module):
            module, name = defined_in(module)[name]
        elif origin(f"{module}.{name}"):
            module, name = f"{module}.{name}", None
        names.append((module, name, alias.asname or alias.name))
    return names


def relative(node):
    """The same import from flat files, one statement per file."""
    lines, names = [], {}
    for module, name, here in imported(node):
        if name is None:
            lines.append(f"from . import {file_name(module)} as {here}")
        else:
            names.setdefault(module, []).append(name if name == here else f"{name} as {here}")
    return lines + [f"from .{file_name(module)} import {', '.join(taken)}" for module, taken in names.items()]


def triton_imports(body):
    """`[(first line, last line)]` of the runs of triton imports at the top of a module, where Python executes them on
    import.
    """
    runs = []
    for node in body:
        if not isinstance(node, ast.Import) or any(a.name.partition(".")[0] != "triton" for a in node.names):
            continue
        if runs and node.lineno == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], node.end_lineno
        else:
            runs.append((node.lineno, node.end_lineno))
    return runs


@cache
def rewritten(module):
    """`(text, modules)`: the source of a module as a flat file, and the modules of ours that it imports."""
    text = origin(module).read_text(encoding="utf-8")
    tree, lines, needed, edits = ast.parse(text), text.splitlines(), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OURS:
            needed |= {module for module, _, _ in imported(node)}
            new = [" " * node.col_offset + line for line in relative(node)]
            new[-1] += lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # a comment
            edits.append((node.lineno, node.end_lineno, new))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(OPERATORS):
            named = f'__name__.replace(".", "_") + "::{node.value.removeprefix(OPERATORS)}"'
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f'"{node.value}"', named)
    for first, last in triton_imports(tree.body):
        imports = "\n".join("    " + line for line in lines[first - 1 : last])
        edits.append((first, last, TRITON.format(imports=imports).splitlines()))
    for first, last, new in sorted(edits, reverse=True):
        lines[first - 1 : last] = new
    source = f"{'kernels' if module.startswith('xlstm_kernels') else 'src'}/{module.replace('.', '/')}.py"
    header = HEADER.format(version=sys.modules["xlstm_hybrid"].__version__, source=source)
    return header + "\n".join(lines) + "\n", frozenset(needed)


def code():
    """{file name: text} of all that the model needs: to load, train and generate, on a CPU and on a GPU."""
    files, wanted = {}, ["xlstm_hybrid.model.modeling"]
    while wanted:
        name = f"{file_name(module := wanted.pop())}.py"
        if name not in files:
            files[name], needed = rewritten(module)
            wanted += sorted(needed)
    return dict(sorted(files.items()))


# --- the checkpoint ----------------------------------------------------------------------------------------------


def config_values(checkpoint):
    """The values of config.json; CheckpointError unless they describe a student of ours."""
    values = read_json(checkpoint / "config.json", checkpoint.name)
    kind, ours = values.get("model_type"), XLSTMHybridConfig.model_type
    if kind != ours:
        raise CheckpointError(
            f"{checkpoint.name}/config.json: model_type is {kind!r}, expected {ours!r}; convert a teacher first"
        )
    values = {key: value for key, value in values.items() if not key.startswith("_") and key != "auto_map"}
    try:
        XLSTMHybridConfig.from_dict(dict(values))
    except ConfigError:
        raise
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.name}/config.json: not a configuration of ours ({reason}); correct it or make the checkpoint again"
        ) from error
    return values


def copied_files(checkpoint):
    """Names of the checkpoint's files that are copied as they are: weights, index, card, pictures, licences."""
    weights = sorted({file.name for file in weight_files(checkpoint).values()})
    index = [INDEX] if (checkpoint / INDEX).is_file() else []
    return [name for name in (*weights, *index) if contained(checkpoint, name).is_file()] + card_files(checkpoint)


def card_files(checkpoint):
    """Names of a checkpoint's card, pictures and licences."""
    names = sorted(p.name for p in checkpoint.iterdir() if CARRIED.fullmatch(p.name))
    return [name for name in names if contained(checkpoint, name).is_file()]


def write_loading(directory, count):
    """Say in the card how to load it, and take back what is no longer so."""
    path = directory / "README.md"
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [xlstm-hybrid, xlstm]\n---\n\n# A hybrid xLSTM student\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else front
    # untrue of this copy
    text = re.sub(r"(?m)^- It loads only where the package xlstm-hybrid is imported.*\n?", "", text)
    section = LOADING.format(count=count, needs=NEEDS)
    # of an export that is exported again
    text = re.sub(r"(?ms)^## Load it without the package$.*?(?=^## |\Z)", "", text)
    before, heading, after = text.partition("## How it was made")
    write_file(path, f"{before.rstrip()}\n\n{section}{chr(10) if heading else ''}{heading}{after}".encode())


def export(checkpoint, out, overwrite=False):
    """Write `out`, the checkpoint with its code: weights, configuration, tokenizer, chat template, generation config,
    card, record and manifest.

    It holds safetensors, JSON, text, pictures and Python source; no pickle.

    Args:
        checkpoint: directory of a student; compared with its manifest where it has one.
        overwrite: replace an existing `out`, once the new one is complete.
    Returns:
        ExportReport
    Raises:
        CheckpointError: no checkpoint of ours, a missing or damaged file, or `out` exists; nothing is written.
        ConfigError: config.json contradicts itself.
        CheckpointWriteError: there is no room for `out`, or it holds the checkpoint; what was there is untouched.
    """
    started, checkpoint, out = time.monotonic(), Path(checkpoint).resolve(), Path(out)
    if checkpoint.is_relative_to(out.resolve()):
        raise CheckpointWriteError(
            f"{out.name}: holds the checkpoint {checkpoint.name}; choose another directory for the export"
        )
    if (checkpoint / MANIFEST).is_file():
        verify_files(checkpoint)
    config, names = config_values(checkpoint), copied_files(checkpoint)
    if wrong := list(islice(weight_faults(checkpoint), 3)):
        raise CheckpointError(f"{checkpoint.name}: {'; '.join(wrong)}; make the checkpoint again, or mend these")
    needed = sum((checkpoint / name).stat().st_size for name in (*names, *settings_files(checkpoint)))
    with staged(out, overwrite, needed) as directory:
        for name in names:
            shutil.copyfile(checkpoint / name, directory / name)
        copy_settings(checkpoint, directory, checkpoint.name)
        files = code()
        for name, text in files.items():
            write_file(directory / name, text.encode())
        copied = {f"{MODELING}.py", *(Path(p).name for p in get_relative_import_files(directory / f"{MODELING}.py"))}
        if copied != set(files):
            raise CheckpointError(
                f"{directory.name}: transformers would copy {sorted(copied ^ set(files))} more or less than the code needs; "
                "report this with the version of transformers"
            )
        write_json(directory / "config.json", using_cache(config) | {"auto_map": AUTO_MAP})
        write_loading(directory, len(files))
        seconds = round(time.monotonic() - started, 3)
        config = {"auto_map": AUTO_MAP, "code": list(files)}
        add_provenance(directory, "export", parent=checkpoint, config=config, seconds=seconds)
        written = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
        write_manifest(directory)
    kept = {name.split("/")[0] for name in written} | {MANIFEST, PROVENANCE}
    left = sorted(p.name for p in checkpoint.iterdir() if p.name not in kept)
    return ExportReport([*written, MANIFEST], list(files), left)
