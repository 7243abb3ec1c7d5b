"""The documents are true: their programs run, their commands and settings exist, their links lead somewhere, and
nothing useful is missing in them.

Python blocks of a document run one after the other in one namespace. A hub id in them is replaced by the tiny teacher
of `recipes/`. Of shell blocks every line is parsed by the command line that it names; those after `<!-- run -->` are
executed as well.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
import typer
import yaml

ROOT = Path(__file__).parents[2]
README, COMMANDS, PACKAGE = ROOT / "README.md", ROOT / "docs/commands.md", ROOT / "src/xlstm_hybrid"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BESIDE = [
    ROOT / "CHANGELOG.md",
    ROOT / "kernels/README.md",
    ROOT / "model_cards/README.md",
    ROOT / "recipes/tiny_teacher/README.md",
]
HUB = re.compile(r"(?<=\")(meta-llama|Qwen|allenai)/[\w.-]+(?=\")")
TINY = "recipes/tiny_teacher/tiny-llama"
OPTIONAL = ("trl", "peft", "datasets", "onnxruntime", "bitsandbytes")
TRAINERS = {  # commands that take the fields of a trainer's config behind their own arguments
    "align": ("xlstm_hybrid.training.alignment", "AlignmentConfig"),
    "distill": ("xlstm_hybrid.training.distillation", "SparseKDConfig"),
    "on-policy": ("xlstm_hybrid.training.on_policy", "OnPolicyKDConfig"),
    "multi-teacher": ("xlstm_hybrid.training.on_policy", "OnPolicyKDConfig"),
    "distil-xlstm": ("xlstm_hybrid.distil_xlstm.trainer", "DeltaKDConfig"),
}
STAGES = {
    "align": "align",
    "distill": "distill",
    "on_policy": "on-policy",
}  # section of a recipe: a command of its trainer
CONFIGS = (
    "XLSTMHybridConfig",
    "DistilXLSTMConfig",
    "AlignmentConfig",
    "SparseKDConfig",
    "OnPolicyKDConfig",
    "DeltaKDConfig",
    "Recipe",
    "Source",
)


def name_of(path):
    return str(path.relative_to(ROOT))


# --- reading documents --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code. heading: under which it stands.  runs: marked to be executed."""

    language: str
    text: str
    heading: str
    runs: bool


@cache
def blocks(path):
    """Every block of code of a document, in order."""
    found, lines, heading, n = [], path.read_text(encoding="utf-8").splitlines(), "", 0
    while n < len(lines):
        if match := re.match(r"(`{3,})(\w*)\s*$", lines[n]):
            end = next(m for m in range(n + 1, len(lines)) if lines[m] == match[1])
            found.append(Block(match[2], "\n".join(lines[n + 1 : end]), heading, lines[n - 1] == "<!-- run -->"))
            n = end
        elif lines[n].startswith("#"):
            heading = lines[n].lstrip("# ")
        n += 1
    return found


def of(path, *languages):
    return [block for block in blocks(path) if block.language in languages]


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the recipes in it, and registries that are put back as they were."""
    from xlstm_hybrid.conversion import families
    from xlstm_hybrid.merging import methods
    from xlstm_hybrid.model import configuration
    from xlstm_hybrid.model.experimental import cells
    from xlstm_hybrid.training import losses

    tables = (losses.DIVERGENCES, methods.MERGES, families.FAMILIES, cells.CELLS)
    saved = [(table, dict(table)) for table in tables]
    monkeypatch.setattr(configuration, "CELLS", configuration.CELLS)
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "recipes", tmp_path / "recipes")
    yield tmp_path
    for table, before in saved:
        table.clear()
        table.update(before)


# --- programs -----------------------------------------------------------------------------------------------------


def run_programs(path):
    """The namespace after all Python blocks of a document, and what they printed."""
    names, printed = {}, io.StringIO()
    torch.manual_seed(0)
    for block in of(path, "python"):
        program = HUB.sub(TINY, block.text)
        for module in OPTIONAL[:4]:
            if re.search(rf"^(from|import) {module}\b", program, re.MULTILINE):
                pytest.importorskip(module)
        with contextlib.redirect_stdout(printed):
            exec(compile(program, name_of(path), "exec"), names)
    return names, printed.getvalue()


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if of(path, "python")], ids=name_of)
def test_the_programs_of_a_document_run_as_they_stand(path, folder):
    run_programs(path)


def test_reading_once_and_answering_twice_gives_what_plain_generation_gives(folder):
    """The README's programs, on the teacher that they name."""
    names, printed = run_programs(README)
    model, tokenizer, answers = names["model"], names["tokenizer"], []
    for question in ("12+30=", "7+5="):
        ids = tokenizer("a long document" + question, return_tensors="pt", return_token_type_ids=False)
        answers.append(tokenizer.decode(model.generate(**ids, max_new_tokens=4)[0]))
    assert printed.rstrip("\n").splitlines()[-len("\n".join(answers).splitlines()) :] == "\n".join(answers).splitlines()
    assert names["load_state"]("document.safetensors", model).get_seq_length() == names["cache"].get_seq_length()


def test_a_program_that_is_wrong_is_noticed(folder, tmp_path):
    (tmp_path / "wrong.md").write_text("```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "name_of", str)
        run_programs(tmp_path / "wrong.md")


LOADS = re.compile(r"\bAuto(Peft)?Model\w*\.from_pretrained")
KNOWN = re.compile(r"^(import xlstm_hybrid\b|from xlstm_hybrid[\w.]* import)", re.MULTILINE)


def unknown_to_auto(text):
    """Whether a program loads with an Auto class and has not imported this package before, so that a process of its own
    would not know students.
    """
    load, known = LOADS.search(text), KNOWN.search(text)
    return bool(load) and (known is None or known.start() > load.start())


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if of(path, "python")], ids=name_of)
def test_what_loads_with_an_auto_class_imports_the_package_in_the_same_block(path):
    assert [block.text for block in of(path, "python") if unknown_to_auto(block.text)] == []


def test_a_block_without_the_import_is_noticed():
    load = 'AutoModelForCausalLM.from_pretrained("student")'
    assert unknown_to_auto(load) and unknown_to_auto(f"{load}\nimport xlstm_hybrid")
    assert unknown_to_auto('AutoPeftModelForCausalLM.from_pretrained("a")')
    assert not unknown_to_auto(f"from xlstm_hybrid.model import adapters\n{load}")


# --- commands -----------------------------------------------------------------------------------------------------


@cache
def command_line():
    from xlstm_hybrid.cli import app

    return typer.main.get_command(app)


@cache
def commands():
    """{name: click command} of the command line; old names, which are hidden, are left out."""
    group = command_line()
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if not command.hidden}


@cache
def arena():
    from xlstm_arena.__main__ import arena

    app = typer.Typer()
    app.command()(arena)
    return typer.main.get_command(app)


def lines_of(path):
    """[(block, words)] of the shell lines of a document: continued lines joined, loops unrolled, comments dropped,
    variables put in.
    """
    found, variables = [], {}
    for block in of(path, "sh", "bash", "shell"):
        for line in re.sub(
            r"for (\w+) in (.*?); do\n(.*?)done\n?", unrolled, block.text.replace("\\\n", " "), flags=re.DOTALL
        ).splitlines():
            if match := re.fullmatch(r"(\w+)=\"(.*)\"", line.strip()):
                variables[match[1]] = match[2]
            elif words := shlex.split(re.sub(r"\$(\w+)", lambda match: variables[match[1]], line), comments=True):
                found.append((block, words))
    return found


def unrolled(loop):
    """A shell loop as its body once per value."""
    return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def our_arguments(words):
    """`(program, arguments)` of a line that calls ours, "xlstm-hybrid" or "xlstm_arena", else None."""
    if Path(words[0]).name == "xlstm-hybrid":
        return "xlstm-hybrid", words[1:]
    for module in ("xlstm_hybrid", "xlstm_arena"):
        if "-m" in words and words[words.index("-m") + 1 :][:1] == [module]:
            return {"xlstm_hybrid": "xlstm-hybrid"}.get(module, module), words[words.index(module) + 1 :]
    return None


def parsed(command, name, arguments):
    """A line as the command line understands it; a file that is not there is no mistake of the document."""
    try:
        return command.make_context(name, list(arguments))
    except Exception as error:  # typer's, or click's
        if "does not exist" not in getattr(error, "message", ""):
            raise
        return None


def check_line(words):
    """Raise for a line that no program understands."""
    if ours := our_arguments(words):
        program, arguments = ours
        if program == "xlstm_arena":
            parsed(arena(), program, arguments)
            return
        if not arguments or arguments[0] not in commands():
            raise LookupError("there is no such command")
        context = parsed(commands()[arguments[0]], arguments[0], arguments[1:])
        if context is not None and context.args:
            module, config = TRAINERS[arguments[0]]
            pytest.importorskip("trl")
            from xlstm_hybrid.pipeline.settings import parse_overrides

            parse_overrides(getattr(importlib.import_module(module), config), context.args)
    elif words[0] == "make":
        text = (ROOT / "Makefile").read_text()
        known = set(re.findall(r"^([\w-]+):", text, re.MULTILINE)) | {
            f"{name}=" for name in re.findall(r"\$\((?:if \$\()?(\w+)", text)
        }
        asked = {re.sub(r"=.*", "=", word) for word in words[1:]}
        assert asked <= known, f"make has no {asked - known}"
    elif words[0] == "pip" or words[1:3] == ["-m", "pip"]:
        extras = set(re.findall(r'"([\w-]+)": Extra\(', (PACKAGE / "environment/versions.py").read_text()))
        extras |= set(re.findall(r'EXTRAS\["([\w-]+)"\]', (ROOT / "setup.py").read_text()))
        asked = {extra for word in words for extra in ",".join(re.findall(r"\[(.*?)\]", word)).split(",") if extra}
        assert asked <= extras, f"setup.py has no extra {asked - extras}"
    elif Path(words[0]).name == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        assert all(word in source for word in words if word.startswith("--")), words
    elif words[0] == "curl":
        json.loads(words[words.index("-d") + 1])
    else:
        assert Path(words[0]).name in ("python", "git", "pre-commit", "OMP_NUM_THREADS=1", "accelerate"), (
            f"who runs {' '.join(words)}?"
        )


@pytest.mark.parametrize(
    "path", [path for path in [*DOCUMENTS, *BESIDE] if of(path, "sh", "bash", "shell")], ids=name_of
)
def test_every_shell_line_is_understood_by_the_program_that_it_calls(path):
    wrong = []
    for _, words in lines_of(path):
        try:
            check_line(words)
        except (AssertionError, click.ClickException) as error:
            wrong.append(f"{' '.join(words)}: {getattr(error, 'message', error)}")
        except Exception as error:  # an error of ours names the field
            wrong.append(f"{' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_command_that_is_named_in_a_sentence_or_a_recipe_exists():
    named = {
        (path.name, name)
        for path in [*DOCUMENTS, *BESIDE]
        for name in re.findall(r"`xlstm-hybrid ([a-z][\w-]*)", prose(path))
    }
    for path in ROOT.glob("recipes/**/*.yaml"):
        comments = " ".join(re.findall(r"#(.*)", path.read_text(encoding="utf-8")))
        named |= {(path.name, name) for name in re.findall(r"xlstm-hybrid ([a-z][\w-]*) ", comments)}
    assert len(named) > 20 and not {(place, name) for place, name in named if name not in commands()}


@pytest.mark.parametrize(
    "line",
    [
        "xlstm-hybrid run x.yaml --fast",
        "xlstm-hybrid walk x.yaml",
        "xlstm-hybrid push folder",
        "make coffee",
        "make real TEXTS=peps.jsonl.xz",
        "xlstm-hybrid align a b --recipe r --learning_rat 1",
        "pip install -e '.[everything]'",
        "sudo rm",
    ],
)
def test_a_line_that_nothing_understands_is_noticed(line):
    with pytest.raises(Exception):  # noqa: B017 (of several libraries)
        check_line(shlex.split(line))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if any(block.runs for block in blocks(path))], ids=name_of)
def test_the_commands_that_are_marked_run(path, folder):
    from typer.testing import CliRunner

    from xlstm_hybrid.cli import app

    pytest.importorskip("trl")
    for block, words in lines_of(path):
        if block.runs:
            result = CliRunner().invoke(app, our_arguments(words)[1])
            assert result.exit_code == 0, f"{' '.join(words)}: {result.exception!r}\n{result.output}"


@pytest.mark.slow
def test_the_guide_to_merging_runs_from_its_first_line_to_its_last(folder):
    """With the recipe of two steps per stage in the place of the quickstart's, and smaller searches."""
    from typer.testing import CliRunner

    from xlstm_hybrid.cli import app

    pytest.importorskip("trl")
    smaller = {"--prompts": "4", "--budget": "2", "--rows": "8", "--max_steps": "1"}
    for block, words in lines_of(ROOT / "docs/merge.md"):
        words = [
            word.replace("recipes/tiny.yaml", "recipes/smoke.yaml").replace("runs/tiny", "runs/smoke") for word in words
        ]
        words = [smaller.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if not block.runs:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{' '.join(words)}: {result.exception!r}\n{result.output}"
    assert {"mean", "ties", "gates", "found", "regmean", "taught"} <= {
        path.name for path in (folder / "runs/smoke").iterdir()
    }


# --- settings -----------------------------------------------------------------------------------------------------


def trainer_fields(command):
    module, config = TRAINERS[command]
    return {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), config))}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if of(path, "yaml")], ids=name_of)
def test_every_setting_of_a_yaml_block_exists(path, tmp_path):
    """A whole recipe is loaded; a part of one takes the place of that of `recipes/smoke.yaml`."""
    from xlstm_hybrid.recipe.schema import load_recipe

    pytest.importorskip("trl")
    for block in of(path, "yaml"):
        part = yaml.safe_load(block.text)
        if "delta" in part:
            assert set(part["delta"]) - {"rows", "sequences_per_step"} <= trainer_fields("distil-xlstm")
            continue
        whole = part if "name" in part else yaml.safe_load((ROOT / "recipes/smoke.yaml").read_text()) | part
        if "merge" in part and "name" not in part:  # its shares are of experts that the block does not show
            whole["experts"] = {"symbols": {"text": 1.0}, "memory": {"recall": 1.0}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
        load_recipe(tmp_path / "recipe.yaml")
        for stage, command in STAGES.items():
            unknown = set(part.get(stage, {})) - {"sequences_per_step"} - trainer_fields(command)
            assert not unknown, f"{name_of(path)}: {stage} has no {unknown}"


# --- links --------------------------------------------------------------------------------------------------------


def slug(heading):
    """The anchor of a heading, as browsers of repositories and the site make it."""
    words = re.sub(r"[`*\\]|\[|\]\(.*?\)", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", words))


@cache
def anchors(path):
    return {slug(line.lstrip("#")) for line in prose(path).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("path", [*DOCUMENTS, *BESIDE], ids=name_of)
def test_every_link_leads_to_a_file_a_heading_or_a_function_that_is_there(path):
    found = [(words, target) for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)(?!`)", prose(path))]
    found += [("", target) for target in re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", prose(path))]
    for words, target in found:
        place, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", target) or anchor in ("only-light", "only-dark"):
            continue
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{target}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"
        if file.suffix == ".py" and (name := re.fullmatch(r"`(\w+)`", words)):
            assert name[1] in defined_in(file), f"{name[1]} is not in {target}"


@cache
def defined_in(file):
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_paths_of_the_repository_in_code_quotes_exist():
    for path in DOCUMENTS:
        if path.name in ("CHANGELOG.md", "arena.md", "compatibility.md"):
            continue
        quoted = set(re.findall(r"`((?:src|kernels|recipes|tests|docs|model_cards|benchmarks)/[\w./-]*)`", prose(path)))
        assert not [place for place in quoted if not (ROOT / place).exists()], name_of(path)


# --- size and completeness ----------------------------------------------------------------------------------------


def test_the_readme_is_read_in_a_few_minutes():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(re.sub(r"<[^>]+>|[|]|-+:?", " ", text).split()) <= 1200  # lines of tables are no words


def test_the_figures_of_the_benchmark_stand_as_they_were_measured():
    made = subprocess.run(
        [sys.executable, "kernels/bench_table.py", "benchmarks/cpu.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in made.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 50 and not set(rows) - set((ROOT / "docs/speed.md").read_text(encoding="utf-8").splitlines())


@cache
def sections(path):
    """[(heading, text, shell lines)] of a document, cut at its headings of every level."""
    parts, found = re.split(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE), []
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        found.append((heading.strip(), text))
    return found


@cache
def options_in_documents():
    """{command: options} that a shell line of that command uses, or that its section, or one with such lines, names in
    code quotes.
    """
    found = {}
    for path in DOCUMENTS:
        for block, words in lines_of(path):
            if (ours := our_arguments(words)) and ours[0] == "xlstm-hybrid" and ours[1]:
                used = {word.partition("=")[0] for word in ours[1][1:] if word.startswith("--")}
                quoted = set(re.findall(r"`(--[\w-]+)", dict(sections(path)).get(block.heading, "")))
                found.setdefault(ours[1][0], set()).update(used | quoted)
    for heading, text in sections(COMMANDS):
        found.setdefault(heading, set()).update(re.findall(r"`(--[\w-]+)", text))
    return found


def test_every_command_has_its_section_and_every_section_its_command():
    assert {heading for heading, text in sections(COMMANDS) if "<!-- options:" in text} == set(commands())


def test_every_option_of_the_command_line_is_used_or_explained_in_a_document():
    missing = []
    for name, command in commands().items():
        for parameter in command.params:
            names = {*parameter.opts, *parameter.secondary_opts}
            if (
                parameter.param_type_name == "option"
                and "--help" not in names
                and not names & options_in_documents().get(name, set())
            ):
                missing.append(f"{name} {parameter.opts[0]}")
    assert not missing, (
        f"{len(missing)} options stand in no document: explain them in docs/commands.md, or delete them: {missing}"
    )


@cache
def sources():
    return {
        path: path.read_text(encoding="utf-8")
        for top in ("src", "kernels")
        for path in sorted((ROOT / top).rglob("*.py"))
    }


@cache
def written():
    """Words of documents and recipes."""
    texts = [
        *DOCUMENTS,
        *BESIDE,
        *ROOT.glob("recipes/**/*.yaml"),
        *ROOT.glob("src/**/*.yaml"),
        *ROOT.glob("src/**/lm_eval_tasks/*"),
    ]
    return Counter(
        word for path in texts if path.is_file() for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))
    )


@cache
def words_of(path):
    return Counter(re.findall(r"\w+", sources()[path]))


def test_every_field_of_a_config_is_used_by_a_document_a_recipe_or_another_module():
    seen, missing = set(), []
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef) or node.name not in CONFIGS:
                continue
            seen.add(node.name)
            for field in (entry.target.id for entry in node.body if isinstance(entry, ast.AnnAssign)):
                if not written()[field] and not any(words_of(other)[field] for other in sources() if other != path):
                    missing.append(f"{node.name}.{field}")
    assert seen == set(CONFIGS)
    assert not missing, (
        f"{len(missing)} fields that nothing names but their own module: document or delete them: {missing}"
    )


def test_every_function_is_used_by_a_module_or_a_document():
    """What only tests call is no function of this project."""
    unused = []
    for path, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                inside = len(re.findall(rf"\b{node.name}\b", ast.get_source_segment(text, node)))
                elsewhere = sum(words_of(other)[node.name] for other in sources() if other != path)
                used = elsewhere or written()[node.name] or node.name.replace("_", "-") in commands()
                if words_of(path)[node.name] <= inside and not used:
                    unused.append(f"{name_of(path)}: {node.name}")
    assert not unused, f"{len(unused)} functions that nothing uses: {unused}"


# --- the site -----------------------------------------------------------------------------------------------------


def test_tables_of_the_site_hold_every_option_and_every_field_of_a_config(monkeypatch):
    """Without mkdocs, which the hook needs for its error and its pages alone."""
    for name in ("mkdocs", "mkdocs.exceptions", "mkdocs.structure", "mkdocs.structure.files"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(PluginError=ValueError, File=None))
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    marks = [found for path in (ROOT / "docs").glob("*.md") for found in hooks.MARK.findall(path.read_text())]
    tables = {name: {"options": hooks.options_table, "fields": hooks.fields_table}[kind](name) for kind, name in marks}
    aligned = tables["xlstm_hybrid.training.alignment.AlignmentConfig"].splitlines()
    assert "| `learning_rate` | `0.01` | Peak learning rate of the new parameters. |" in aligned
    assert any("| `--overwrite` |" in line for line in tables["convert"].splitlines())
    assert len(tables) > 20 and all(len(text.splitlines()) > 2 or "no arguments" in text for text in tables.values())
    with pytest.raises(ValueError, match="the command line has no wander"):
        hooks.options_table("wander")


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"(https?:[^\"]+)", text)
        fetched += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect|preload)\"[^>]+href=\"(https?:[^\"]+)", text)
        assert not fetched, f"{page.name}: {fetched}"
