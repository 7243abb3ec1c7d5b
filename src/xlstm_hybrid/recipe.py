"""Recipes: one YAML file that says what a run does. Read strictly: an unknown key is an error, not a surprise later."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from xlstm_hybrid.errors import ConfigError

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """A run, section by section; see `recipes/tiny.yaml`.

    teacher: checkpoint directory (relative to the recipe) or hub id.  out: run directory.  seed: of data and training.
    student: arguments of `conversion.convert`.  data: {"sequence_length", "mixture"} of stage I, the length also of stage II.
    align, distill: fields of `AlignmentConfig` and `SparseKDConfig`.  experts: {name: mixture}.
    merge: {"method", "weights": {expert: share}}.  evaluate: {"examples", "text_chunks", "batch_size"}.
    """

    name: str
    teacher: str
    out: str
    student: dict
    data: dict
    align: dict
    distill: dict
    experts: dict
    merge: dict
    evaluate: dict
    seed: int = 0
    path: Path = field(default=Path("recipe.yaml"), compare=False)


SECTIONS = {"data": {"sequence_length", "mixture"}, "merge": {"method", "weights"}, "evaluate": {"examples", "text_chunks", "batch_size"}}


def load_recipe(path):
    """Read and check a recipe.

    Raises:
        ConfigError: no such file, not YAML, over 1 MB, unknown or missing keys, merge weights that do not name the experts.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}: expected a YAML file, for example recipes/tiny.yaml")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path.name}: {path.stat().st_size} bytes, a recipe has at most {MAX_BYTES}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected keys and values, got {type(content).__name__}")
    known = {f.name: f for f in fields(Recipe) if f.name != "path"}
    unknown, missing = sorted(set(content) - set(known)), sorted(set(known) - set(content) - {"seed"})
    wrong = [f"unknown keys {unknown}"] * bool(unknown) + [f"missing keys {missing}"] * bool(missing)
    for section, keys in SECTIONS.items():
        if not isinstance(content.get(section), dict) or set(content[section]) != keys:
            wrong.append(f"{section}: expected exactly the keys {sorted(keys)}, got {sorted(content.get(section) or {})}")
    if wrong:
        raise ConfigError(f"{path.name}: {'; '.join(wrong)}; known keys are {sorted(known)}")
    if set(content["merge"]["weights"]) != set(content["experts"]):
        raise ConfigError(f"{path.name}: merge.weights names {sorted(content['merge']['weights'])}, the experts are {sorted(content['experts'])}")
    return Recipe(**content, path=path)


def resolve_teacher(recipe):
    """The teacher as a local path where the recipe's folder or the working directory holds one, else the hub id as it is."""
    for base in (recipe.path.parent, Path()):
        if (base / recipe.teacher).exists():
            return base / recipe.teacher
    return recipe.teacher
