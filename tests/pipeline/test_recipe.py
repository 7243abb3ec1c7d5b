"""A recipe is read strictly: what it does not say, or says wrongly, is an error before anything runs."""

from pathlib import Path

import pytest
import yaml

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "path", [p for p in sorted(RECIPES.glob("*.yaml")) if not p.name.startswith("distil_")], ids=lambda p: p.name
)
def test_every_recipe_of_the_repository_loads(path):
    recipe = load_recipe(path)
    assert recipe.merge is None or sum(recipe.merge["weights"].values()) == pytest.approx(1)
    for expert in (None, *recipe.experts):
        assert len(recipe.mix(expert)) == 1


@pytest.mark.parametrize("name", ["tiny", "smoke"])
def test_the_recipes_for_a_small_machine_find_their_teacher(name):
    assert (resolve_teacher(load_recipe(RECIPES / f"{name}.yaml")) / "model.safetensors").is_file()


def test_a_teacher_that_is_no_folder_stays_a_hub_id(tmp_path):
    content = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | {"teacher": "somebody/some-model"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert resolve_teacher(load_recipe(tmp_path / "r.yaml")) == "somebody/some-model"


def without(key):
    return lambda content: content.pop(key)


def source(**fields):
    """A change that makes the data a source with these fields."""
    return lambda content: content.update(data={"sequence_length": 8, "sources": {"a": fields}})


def search(group_weights=None, **settings):
    """A change that lets a search find the weights."""
    section = {"method": "linear", "search": settings} | ({"group_weights": group_weights} if group_weights else {})
    return lambda content: content.update(merge=section)


BREAKS = {
    r"unknown keys \['learning_rate'\]": lambda c: c.update(learning_rate=1),
    r"unknown keys \['evalute'\], expected some of .*\(did you mean evaluate\?\)": lambda c: c.update(evalute={}),
    r"missing keys \['align'\]": without("align"),
    r"out='runs/../elsewhere': expected a directory without '..'": lambda c: c.update(out="runs/../elsewhere"),
    r"out=' ': expected a directory": lambda c: c.update(out=" "),
    r"align.output_dir='runs/x': all stages write below `out`": lambda c: c["align"].update(output_dir="runs/x"),
    r"distill.output_dir='': all stages write": lambda c: c["distill"].update(output_dir=""),
    r"evaluate: expected exactly the keys": lambda c: c["evaluate"].pop("examples"),
    r"evaluate.examples=0: expected a number of at least 1": lambda c: c["evaluate"].update(examples=0),
    r"evaluate.limit=0: expected a number of at least 1": lambda c: c["evaluate"].update(limit=0),
    r"evaluate.harness=\[\]: expected names": lambda c: c["evaluate"].update(harness=[]),
    r"evaluate.harness='domains': expected list": lambda c: c["evaluate"].update(harness="domains"),
    r"evaluate.alpha=1.5: expected a share between 0 and 1": lambda c: c["evaluate"].update(alpha=1.5),
    r"evaluate.long_context: unknown keys \['sizes'\].*evaluate.long_context: expected lengths": lambda c: c[
        "evaluate"
    ].update(long_context={"sizes": [1]}),
    r"evaluate.long_context.samples=0: expected a number": lambda c: c["evaluate"].update(
        long_context={"lengths": [64], "samples": 0}
    ),
    r"evaluate.efficiency.rounds=True: expected int": lambda c: c["evaluate"].update(efficiency={"rounds": True}),
    r"evaluate: \['limit'\] without harness or long_context": lambda c: [
        c["evaluate"].pop(k) for k in ("harness", "long_context")
    ],
    r"merge.weights names \['other'\], the experts are \['memory', 'symbols'\]": lambda c: c["merge"].update(
        weights={"other": 1.0}
    ),
    r"merge: expected method and weights, as there are several experts": without("merge"),
    r"merge.method='mean': expected one of linear, .*on_policy": lambda c: c["merge"].update(method="mean"),
    r"merge: unknown keys \['weight'\], expected some of": lambda c: c["merge"].update(weight=1),
    r"merge.weights: .*, expected shares of at least 0 whose sum is 1": lambda c: c["merge"].update(
        weights={"symbols": 0.7, "memory": 0.7}
    ),
    r"merge.weights: .*, expected shares": lambda c: c["merge"].update(weights={"symbols": 1.5, "memory": -0.5}),
    r"merge.weights: .*'half'.*, expected shares": lambda c: c["merge"].update(
        weights={"symbols": "half", "memory": 0.5}
    ),
    r"merge: expected either weights or search": lambda c: c["merge"].pop("weights"),
    r"merge: expected either weights or search, which finds them": lambda c: c["merge"].update(search={"examples": 4}),
    r"merge.options: density=2: expected a share above 0, at most 1": lambda c: c["merge"].update(
        method="ties", options={"density": 2}
    ),
    r"merge.options: density: it takes no options": lambda c: c["merge"].update(options={"density": 0.5}),
    r"merge.options: expected names and values, got 0.5": lambda c: c["merge"].update(method="ties", options=0.5),
    r"merge.base='aligned': expected 'aligned' or a path, for one of dare": lambda c: c["merge"].update(base="aligned"),
    r"merge.base=5: expected 'aligned' or a path": lambda c: c["merge"].update(method="ties", base=5),
    r"merge.group_weights: 'heads' is no module group": lambda c: c["merge"].update(
        group_weights={"heads": {"symbols": 1, "memory": 0}}
    ),
    r"merge.group_weights.gates names \['symbols'\]": lambda c: c["merge"].update(
        group_weights={"gates": {"symbols": 1}}
    ),
    r"merge.statistics: linear takes none, only fisher, regmean": lambda c: c["merge"].update(statistics={"rows": 8}),
    r"merge.statistics.rows=0: expected a whole number of at least 1": lambda c: c["merge"].update(
        method="fisher", statistics={"rows": 0}
    ),
    r"merge.statistics.labels='both': expected one of": lambda c: c["merge"].update(
        method="fisher", statistics={"labels": "both"}
    ),
    r"merge.search: unknown keys \['prompts'\]": search(prompts=5),
    r"merge.search.parts=7: expected a divisor of 60": search(examples=4, parts=7),
    r"merge.search: expected either examples, of the tiny domains, or documents": search(budget=5),
    r"merge.search.documents: expected sources for every expert": search(documents=5),
    r"merge.search: expected two experts or more, and no group_weights": search(
        group_weights={"gates": {"symbols": 1, "memory": 0}}, examples=4
    ),
    r"merge: method on_policy merges no weights, leave out base, options": lambda c: c["merge"].update(
        method="on_policy", base="a", options={}
    ),
    r"merge: method on_policy needs the section on_policy": lambda c: c["merge"].update(method="on_policy"),
    r"merge.on_policy.max_steps=None: expected a number of steps": lambda c: c["merge"].update(
        method="on_policy", on_policy={"lmbda": 1}
    ),
    r"merge.method='slerp': expected two experts, got 3": lambda c: (
        c["experts"].update(third={"text": 1.0}),
        c["merge"].update(method="slerp", weights={"symbols": 1, "memory": 0, "third": 0}),
    ),
    r"seed: expected int, got str": lambda c: c.update(seed="7"),
    r"name='../elsewhere': expected letters": lambda c: c.update(name="../elsewhere"),
    r"align.max_steps=None: expected a number of steps": lambda c: c["align"].pop("max_steps"),
    r"distill.sequences_per_step=0.5: expected a number of rows": lambda c: c["distill"].update(sequences_per_step=0.5),
    r"data.sequence_length='many': expected at least 2 tokens": lambda c: c["data"].update(sequence_length="many"),
    r"data: expected exactly one of \['mixture', 'sources'\], got \[\]": lambda c: c["data"].pop("mixture"),
    r"data: unknown keys \['sequence'\]": lambda c: c["data"].update(sequence=5),
    r"data.held_out=0.9: expected a share of 0 to 0.5": lambda c: c["data"].update(held_out=0.9),
    r"data: the share of text is -1, expected a positive number": lambda c: c["data"]["mixture"].update(text=-1),
    r"experts.symbols: the share of code is 'half'": lambda c: c["experts"]["symbols"].update(code="half"),
    r"experts.a/b: expected a plain name": lambda c: c["experts"].update({"a/b": {"text": 1.0}}),
    r"experts.memory: unknown keys \['text'\] beside sources": lambda c: c["experts"].update(
        memory={"text": 1, "sources": {}}
    ),
    r"data.sources.a: expected path and others of .*'weight'.*, got \['paths'\]": source(paths="x"),
    r"data.sources.a: expected exactly one of text, messages, and prompt with completion": source(path="x"),
    r"data.sources.a: expected exactly one of text": source(path="x", text="t", messages="m"),
    r"data.sources.a: expected exactly one of text, messages": source(path="x", prompt="q"),
    r"data.sources.a: weight=0: expected a positive number, or 0 beside held_out_split": source(
        path="x", text="t", weight=0
    ),
    r"data.sources.a: held_out_split='train': expected the name of another split than 'train'": source(
        path="x", text="t", held_out_split="train"
    ),
    r"data.sources.a: held_out_split=1: expected the name": source(path="x", text="t", held_out_split=1),
    r"data.sources: all weights are 0": source(path="x", text="t", held_out_split="test", weight=0),
    r"data.held_out=0.1: every source has its held_out_split": lambda c: (
        source(path="x", text="t", held_out_split="test")(c),
        c.update(experts=dict.fromkeys(c["experts"], {"sources": c["data"]["sources"]})),
        c["data"].update(held_out=0.1),
    ),
    r"align.max_steps=0: there is no stage I then, leave out learning_rate, per_device": lambda c: c["align"].update(
        max_steps=0
    ),
    r"align.max_steps=False: expected a number of steps": lambda c: c.update(align={"max_steps": False}),
    r"distill.max_steps=0: expected a number of steps": lambda c: c["distill"].update(max_steps=0),
    r"data.sources.a: score='first', overlong=None": source(path="x", messages="m", score="first"),
    r"data.sources.a: where='kind': expected \{column: value\}": source(path="x", text="t", where="kind"),
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
        ("x: " + "a" * (1 << 20), "expected a recipe of at most"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
        ("a: &a [1]\nb: [" + ", ".join(["*a"] * 101) + "]", "more than 100 aliases or 20 levels"),
        ("[" * 25 + "]" * 25, "more than 100 aliases or 20 levels"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")


def test_one_expert_needs_no_merge_and_an_unknown_one_is_named(tmp_path):
    content = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | {"experts": {"all": {"text": 1.0}}}
    del content["merge"], content["evaluate"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.merge is recipe.evaluate is None and recipe.mix("all") == {"mixture": {"text": 1.0}}
    with pytest.raises(ConfigError, match=r"expert 'other': r.yaml has \['all'\]"):
        recipe.mix("other")


def test_a_recipe_that_extends_another_is_that_one_but_for_its_own_sections(tmp_path):
    tiny = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    own = {"name": "wide", "student": {"sliding_window": 64}, "align": {"max_steps": 0}}
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump({"extends": "tiny.yaml", **own}))
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(tiny | own))
    assert load_recipe(tmp_path / "wide.yaml") == load_recipe(tmp_path / "whole.yaml")
    for content, message in {
        "extends: ../tiny.yaml": "expected the name of a recipe in the same folder",
        "extends: 1": "expected the name of a recipe in the same folder",
        "extends: wide.yaml": "expected a recipe that is whole, and extends no other",
        "extends: gone.yaml": r"no recipe at .*gone.yaml",
        "extends: tiny.yaml\nsudent: {}": r"unknown keys \['sudent'\].*did you mean student",
    }.items():
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_recipe(tmp_path / "r.yaml")


def test_all_mistakes_are_listed_at_once(tmp_path):
    content = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    content["data"]["sequence_length"], content["merge"]["weights"] = 0, {}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"sequence_length=0.*merge.weights names"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_comes_with_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "recipes/tiny.yaml"):
        assert load_recipe(name) == load_recipe(RECIPES / "tiny.yaml") and resolve_teacher(load_recipe(name)).is_dir()
    with pytest.raises(ConfigError, match="no recipe at tiny2"):
        load_recipe("tiny2")
    with pytest.raises(ConfigError, match="no recipe at elsewhere/tiny.yaml"):
        load_recipe("elsewhere/tiny.yaml")
