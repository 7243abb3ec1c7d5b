"""A recipe is read strictly: what it does not say, or says wrongly, is an error before anything runs."""

from pathlib import Path

import pytest
import yaml

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe import load_recipe, resolve_teacher

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_repository_loads_and_finds_its_teacher(path):
    recipe = load_recipe(path)
    assert (resolve_teacher(recipe) / "model.safetensors").is_file()
    assert sum(recipe.merge["weights"].values()) == pytest.approx(1)


def test_a_teacher_that_is_no_folder_stays_a_hub_id(tmp_path):
    content = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | {"teacher": "somebody/some-model"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert resolve_teacher(load_recipe(tmp_path / "r.yaml")) == "somebody/some-model"


def without(key):
    return lambda content: content.pop(key)


BREAKS = {
    r"unknown keys \['learning_rate'\]": lambda c: c.update(learning_rate=1),
    r"missing keys \['align'\]": without("align"),
    r"evaluate: expected exactly the keys": lambda c: c["evaluate"].pop("examples"),
    r"merge.weights names \['other'\], the experts are \['memory', 'symbols'\]": lambda c: c["merge"].update(weights={"other": 1.0}),
}


@pytest.mark.parametrize("message", BREAKS)
def test_a_recipe_with_a_mistake_is_refused(tmp_path, message):
    content = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    BREAKS[message](content)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "expected keys and values, got list"),
        ("x: " + "a" * (1 << 20), "a recipe has at most"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")
