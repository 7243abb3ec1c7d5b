"""What the site has beside the files of docs/: tables of options and fields, pages of the API, recipes, and links that lead to them.

In a document stand `<!-- options: run -->`, after which the site shows the options of a command as the command line has them, and
`<!-- fields: xlstm_hybrid.training.distillation.SparseKDConfig -->`, the fields of a trainer's config. Links to files of the repository, such as
`../src/xlstm_hybrid/state.py`, work where the repository is browsed; here they lead to the page of that module, recipe or document.
"""

import ast
import dataclasses
import importlib
import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGES = {"xlstm_hybrid": ROOT / "src/xlstm_hybrid", "xlstm_kernels": ROOT / "kernels/xlstm_kernels"}
BESIDE = {  # documents beside docs/, and the page of each
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
    "recipes/tiny_teacher/README.md": "tiny-teacher.md",
    "model_cards/README.md": "model-cards.md",
    "README.md": "index.md",
}
TITLES = {"contributing.md": "Contributing", "changelog.md": "Changes", "kernels.md": "The kernels"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
MARK = re.compile(r"<!-- (options|fields): ([\w.-]+) -->")


# --- the pages that there are -------------------------------------------------------------------------------------


def modules(room):
    """Paths of the modules of a room, a folder or a file of a package; those that say nothing are left out."""
    found = sorted(room.rglob("*.py")) if room.is_dir() else [room]
    return [path for path in found if documented(path)]


def documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return any(ast.get_docstring(node) and not node.name.startswith("_") for node in defined)


def module_name(path):
    package = next(folder for folder in PACKAGES.values() if folder in path.parents)
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def rooms():
    """{page of the API: (title, paths of its modules)}: one page per room of the package, one for the kernels."""
    found = {}
    for room in sorted(PACKAGES["xlstm_hybrid"].iterdir()):
        if (
            (room.is_dir() or room.suffix == ".py")
            and room.stem not in ("__init__", "__main__", "commands", "cli")
            and modules(room)
        ):
            found[f"api/{room.stem}.md"] = (room.stem, modules(room))
    found["api/kernels.md"] = ("xlstm_kernels", modules(PACKAGES["xlstm_kernels"]))
    return found


def recipes():
    """{page: path} of the recipes."""
    return {f"recipes/{path.stem}.md": path for path in sorted(ROOT.glob("recipes/*.yaml"))}


def on_config(config):
    nav = [*config.nav]
    reference = next(entry["Reference"] for entry in nav if "Reference" in entry)
    reference.append({"Recipes": [{path.stem: page} for page, path in recipes().items()]})
    reference.append({"API": [{title: page} for page, (title, _) in rooms().items()]})
    evidence = next(entry["Evidence"] for entry in nav if "Evidence" in entry)
    if (ROOT / "docs/compatibility.md").is_file():
        evidence.append({"Compatibility": "compatibility.md"})
    evidence += [
        {"The kernels": "kernels.md"},
        {"The tiny teacher": "tiny-teacher.md"},
        {"Model cards": "model-cards.md"},
    ]
    nav.append({"Project": [{"Contributing": "contributing.md"}, {"Changes": "changelog.md"}]})
    config.nav = nav
    return config


def on_files(files, config):
    pages = {page: api_page(title, paths) for page, (title, paths) in rooms().items()}
    pages |= {page: recipe_page(path) for page, path in recipes().items()}
    pages |= {page: beside(source) for source, page in BESIDE.items() if page != "index.md"}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def api_page(title, paths):
    parts = [f"# `{title}`"]
    parts += [f"::: {module_name(path)}" for path in paths]
    return "\n\n".join(parts) + "\n"


def recipe_page(path):
    return f"# {path.stem}\n\n`recipes/{path.name}`\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"


def beside(source):
    """A document beside docs/, its links as from docs/."""
    folder = (ROOT / source).parent
    text = (ROOT / source).read_text(encoding="utf-8")

    def from_docs(match):
        words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"[{words}]({os.path.relpath(folder / target.partition('#')[0], ROOT / 'docs')}{''.join(target.partition('#')[1:])})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", from_docs, text)


# --- what a page shows --------------------------------------------------------------------------------------------


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    markdown = MARK.sub(lambda match: {"options": options_table, "fields": fields_table}[match[1]](match[2]), markdown)
    return LINK.sub(lambda match: relinked(match, here), markdown)


def on_page_content(html, page, config, files):
    """Names of options do not break at their hyphens."""
    return re.sub(r"<code>(--?[a-zA-Z][\w-]{0,24})</code>", r'<code class="whole">\1</code>', html)


def relinked(match, here):
    """A link to a file of the repository as one to its page; words alone where it has none."""
    words, target, anchor = match[1], match[2].removeprefix("../"), match[3] or ""
    path = ROOT / target
    page = BESIDE.get(target) or next((page for page, recipe in recipes().items() if recipe == path), None)
    if path.suffix == ".py":
        name = re.fullmatch(r"`(\w+)`", words)
        page, anchor = module_place(path, name and name[1])
    if page is None:
        return words
    return f"[{words}]({os.path.relpath(page, os.path.dirname(here) or '.')}{anchor})"


def module_place(path, name):
    """`(page, anchor)` of a module in the API, or of a function or class of it; `(None, "")` if it is not shown."""
    page = next((page for page, (_, paths) in rooms().items() if path in paths), None)
    if page is None:
        return None, ""
    defined = {
        node.name: node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    shown = name in defined and ast.get_docstring(defined[name])
    return page, f"#{module_name(path)}" + (f".{name}" if shown else "")


def table(rows):
    cells = [
        ["" if cell is None else str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def options_table(command):
    """The arguments and options of a command, read from the command line itself."""
    import click
    import typer.main

    from xlstm_hybrid.cli import app

    group = typer.main.get_command(app)
    found = group.get_command(click.Context(group), command)
    if found is None:
        raise PluginError(f"commands.md: the command line has no {command}; take its section out, or mend its name")
    rows = [["argument or option", "default", "what it is"]]
    for parameter in found.params:
        if parameter.name == "help":
            continue
        is_option = parameter.param_type_name == "option"
        name = (
            ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
            if is_option
            else f"`{parameter.name.upper()}`"
        )
        default = (
            "required" if parameter.required else "" if parameter.default in (None, False) else f"`{parameter.default}`"
        )
        rows.append([name, default, getattr(parameter, "help", None)])
    return table(rows) if len(rows) > 1 else "It takes no arguments."


def fields_table(name):
    """The fields that a trainer's config adds or changes."""
    module, _, config = name.rpartition(".")
    config = getattr(importlib.import_module(module), config)
    rows = [["field", "default", "what it is"]]
    for field in dataclasses.fields(config):
        if field.name in config.__annotations__:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "required" if default is dataclasses.MISSING else f"`{default!r}`"
            rows.append([f"`{field.name}`", default, field.metadata.get("help", "")])
    return table(rows)
