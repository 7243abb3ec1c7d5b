"""What the arena compares, read strictly from one YAML file: the setting that all arms share, and in what each arm
differs from it.

An arm is a way from the teacher to a student. Its sections go over those of the setting, key by key; what it does not
name is as in every other arm.
"""

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path

from xlstm_arena.data import LONG
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.distil_xlstm import DistilXLSTMConfig
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.recipe.merge_settings import METHODS, NEED_STATISTICS, is_number, unknown_keys
from xlstm_hybrid.recipe.schema import NAME, SHIPPED, read_yaml

# of each kind of student, in their order
STAGES = {"hybrid": ("calibrate", "align", "distill", "delta", "on_policy"), "distil": ("delta",)}
DEFAULT_STAGES = {"hybrid": ("align", "distill"), "distil": ("delta",)}
TRAINED = ("calibrate", "align", "distill", "on_policy", "delta")  # sections of the stages' settings
CALIBRATED = {
    "max_steps",
    "per_device_train_batch_size",
}  # keys of stage 0: batches that it is fitted to, and their rows
ROWS = {"length": (1, 2**20), "recall_share": (0, 1)}  # keys of `data`; a section of a stage may have them as well
EVALUATE = {"lengths": list, "rows": int, "tokens": int, "batch_tokens": int, "short_rows": int, "text_rows": int}
KEPT_BY = ("ablate", "add", "greedy", "worst")
EXTRAS = ("keep", "lora", "experts", "expert_stages", "merge", "freeze", "restore")  # of an arm, where it has them
TEACHER = "teacher"  # stands among the arms in results: the teacher itself
MERGES = [method for method in METHODS if method not in NEED_STATISTICS]
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
MEASURES = ("short", "perplexity")  # of an ordering, besides KIND@LENGTH such as multikey@512


@dataclass(frozen=True)
class Arm:
    """One way to a student.

    about: what it is, in a line.
    tier: 1 decides, 2 and 3 follow.
    teachers: names of those that it is made for, where it says something per layer; None: of all.
    kind: "hybrid" (`conversion.convert`) or "distil" (`distil.convert`, a recurrent student).
    start: another arm, whose student this one begins with instead of a conversion; `student` then changes fields of its
    config, and its weights stay.
    student: options of `convert`.
    keep: {"groups": k, "by": a key of KEPT_BY}: the student keeps k KV groups, chosen by a measurement on recall rows
        (`allocation.rank_groups` of the teacher's windowed student): the best by that method, or as a control the
        "worst" of an ablation.
    data: {"length", "recall_share"} of the rows of every stage.
    stages: those that are run, in order; none: the student is evaluated as it was converted. With `start` they have to
    be named.
    calibrate: CALIBRATED, and `length`, `recall_share`; a quarter as many rows are held out.
    align, distill, on_policy, delta: fields of the trainers' configs, and `length`, `recall_share` where a stage has
    its own.
    lora: options of `adapters.lora_config` (targets, r, ...) for stage II.
    experts: {name: {"recall_share": ...}}: each is distilled with its data from the same start, for an equal part of
    the steps; then they are merged.
    expert_stages: what each expert runs before merging, "distill" or "distill" and "on_policy".
    merge: arguments of `merging.merge` (method, weights as {expert: share}, options); where a method has a base, it is
    the experts' start.
    freeze: names of modules, such as q_proj, that do not learn in stage II.
    restore: names of modules, such as q_proj, whose weights become the teacher's again after the last stage
    (QK-Restore, arXiv 2606.11052).
    evaluate: {row: fields of the config that are changed for it}: more rows of results of the same weights, such as a
    branch that is switched off.
    """

    name: str
    about: str = ""
    tier: int = 2
    teachers: list | None = None
    kind: str = "hybrid"
    start: str | None = None
    student: dict = field(default_factory=dict)
    keep: dict | None = None
    data: dict = field(default_factory=dict)
    stages: list | None = None
    calibrate: dict = field(default_factory=dict)
    align: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    on_policy: dict = field(default_factory=dict)
    delta: dict = field(default_factory=dict)
    lora: dict | None = None
    experts: dict | None = None
    expert_stages: list | None = None
    merge: dict | None = None
    freeze: list | None = None
    restore: list | None = None
    evaluate: dict = field(default_factory=dict)

    @property
    def order(self):
        """Its stages, those of its kind where it names none."""
        return tuple(DEFAULT_STAGES[self.kind] if self.stages is None else self.stages)

    @property
    def every_stage(self):
        """Its stages, and what its experts run after their first one."""
        return *self.order, *(self.expert_stages or ())[1:]

    def fits(self, teacher):
        """Whether it is made for a teacher."""
        return self.teachers is None or teacher in self.teachers


@dataclass(frozen=True)
class Arena:
    """The setting and its arms.

    teachers: {name: checkpoint directory, relative to the file}; the first one is where every arm runs.
    evaluate: {"lengths": tokens of the recall tests, "rows": most rows of a test, "tokens": most tokens of a recall
        test (at least 8 rows are read), "batch_tokens": of one forward, "short_rows": rows per short task, "text_rows":
        rows of text for the perplexity}.
    orderings: [{"claim", "better", "worse", "measures", "source"}]: what somebody published, as two arms (ARM, or
        ARM/ROW of its `evaluate`) and measures, each of MEASURES or KIND@LENGTH.
    The rest: see `Arm`.
    """

    name: str
    teachers: dict
    seeds: list
    student: dict
    data: dict
    evaluate: dict
    arms: dict
    calibrate: dict = field(default_factory=dict)
    align: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    on_policy: dict = field(default_factory=dict)
    delta: dict = field(default_factory=dict)
    orderings: list = field(default_factory=list)
    path: Path = field(default=Path("arena.yaml"), compare=False)

    @property
    def window(self):
        return self.student["sliding_window"]

    @property
    def sinks(self):
        return self.student["num_sink_tokens"]

    def teacher_dir(self, teacher):
        return self.path.parent / self.teachers[teacher]

    def settings(self, arm, stage):
        """`(fields of the stage's config, {"length", "recall_share"} of its rows)`."""
        whole = {**self.data, **getattr(self, stage), **arm.data, **getattr(arm, stage)}
        return {k: v for k, v in whole.items() if k not in ROWS}, {k: whole[k] for k in ROWS}

    def student_options(self, arm):
        """What `convert` is told; a recurrent student shares nothing but its context with the hybrids."""
        known = self.student if arm.kind == "hybrid" else options_of("distil")
        return {k: v for k, v in self.student.items() if k in known} | arm.student

    def resolved(self, arm):
        """Everything that the arm's training depends on, as JSON has it."""
        if arm.name == TEACHER:
            return {}
        pairs = {stage: self.settings(arm, stage) for stage in arm.every_stage}
        settings = {stage: {"fields": fields, "rows": rows} for stage, (fields, rows) in pairs.items()}
        started = {} if arm.start is None else {"start": self.resolved(self.arms[arm.start])}
        changes = arm.student if arm.start else self.student_options(arm)
        more = {name: getattr(arm, name) for name in EXTRAS if getattr(arm, name)}
        return {"kind": arm.kind, "student": changes, "stages": list(arm.order), **settings, **more, **started}

    def tokens(self, arm):
        """Tokens that the arm's training reads, without those of the arm that it starts from."""
        total = 0
        for stage in arm.every_stage:
            given, rows = self.settings(arm, stage)
            batch = given.get("per_device_train_batch_size", 8) * given.get("gradient_accumulation_steps", 1)
            total += given["max_steps"] * batch * rows["length"]
        return total


# --- reading ---------------------------------------------------------------------------------------------------


def load_arena(path=None):
    """Read and check an arena: by default `arena/arena.yaml` of the recipes in the working directory, in a working copy
    or in an installed package.

    Raises:
        ConfigError: no such file, not YAML, unknown or missing keys, values of a wrong type, an arm that starts from
            none, an ordering of arms that are not there; all mistakes are listed.
    """
    if path is None:
        places = [folder / "arena/arena.yaml" for folder in (Path("recipes"), *SHIPPED)]
        path = next((p for p in places if p.is_file()), places[0])
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected keys and values, got {type(content).__name__}")
    needed = ("name", "teachers", "seeds", "student", "data", "evaluate", "arms")
    wrong = key_faults("the file", content, Arena, needed, given={"path"}) or top_faults(content)
    for name, entry in (content["arms"] if not wrong else {}).items():
        wrong += [f"arms.{name}: {fault}" for fault in arm_faults(name, entry, content["arms"])]
    if not wrong:
        arms = {name: Arm(name, **(entry or {})) for name, entry in content["arms"].items()}
        arena = Arena(**content | {"arms": arms}, path=path)
        wrong = test_faults(arena.evaluate) + combined_faults(arena) + ordering_faults(arena)
    if wrong:
        raise ConfigError(f"{path.name}: {'; '.join(wrong)}")
    return arena


def key_faults(where, content, cls, needed=(), given=()):
    """Keys that are unknown, missing or of a wrong type, by the fields of a dataclass."""
    known = {f.name: f.type for f in fields(cls) if f.name not in given}
    wrong = unknown_keys(f"{where}: ", content, known)
    wrong += [f"{where}: missing keys {missing}"] if (missing := sorted(set(needed) - set(content))) else []
    for name, value in content.items():
        kind = known.get(name, object)
        if isinstance(value, bool) or not isinstance(value, kind):
            wrong.append(f"{where}: {name}={value!r}, expected {getattr(kind, '__name__', kind)}")
    return wrong


def top_faults(content):
    """Mistakes of what all arms share."""
    wrong = [f"{key}: expected at least one entry" for key in ("teachers", "seeds", "arms") if not content[key]]
    wrong += [f"seeds: {s!r} is no number of at least 0" for s in content["seeds"] if not is_count(s, least=0)]
    named = {n for n, place in content["teachers"].items() if NAME.fullmatch(str(n)) and place}
    wrong += [f"teachers.{n}: expected a plain name and a directory" for n in content["teachers"] if n not in named]
    for section, keys in (("student", ("sliding_window", "num_sink_tokens")), ("data", ROWS)):
        wrong += [f"{section}: expected {key}" for key in keys if key not in content[section]]
    return wrong + convert_faults("student", content["student"], "hybrid") + row_faults("data", content["data"])


def options_of(kind):
    """Names that `convert` of a kind of student takes."""
    config, own = XLSTMHybridConfig, inspect.signature(convert).parameters
    if kind == "distil":
        config, own = DistilXLSTMConfig, {"dtype": None}
    return {*config.__annotations__, *own} - {"teacher", "out", "overwrite", "overrides", "revision", "shard_bytes"}


def convert_faults(where, options, kind):
    unknown = sorted(map(str, set(options) - options_of(kind)))
    return [f"{where}: convert has no options {unknown}"] if unknown else []


def row_faults(where, section):
    """Mistakes of a section that says what rows a stage reads."""
    wrong = unknown_keys(f"{where}: ", section, ROWS)
    for name, (low, high) in ROWS.items():
        if name in section and (not is_number(section[name]) or not low <= section[name] <= high):
            wrong.append(f"{where}.{name}={section[name]!r}: expected {low} to {high}")
    return wrong


def arm_faults(name, entry, arms):
    """Mistakes of one arm, in words."""
    entry = {} if entry is None else entry
    if not NAME.fullmatch(str(name)) or name == TEACHER or not isinstance(entry, dict):
        return [f"expected a plain name (not {TEACHER!r}) and keys with values"]
    if wrong := key_faults("arm", entry, Arm, given={"name"}):
        return wrong
    arm = Arm(name, **entry)
    if arm.kind not in STAGES:
        return [f"kind={arm.kind!r}: expected one of {list(STAGES)}"]
    order = STAGES[arm.kind]
    if list(arm.order) != [s for s in order if s in arm.order]:
        wrong.append(f"stages={arm.stages}: expected some of {list(order)}, in this order")
    unused = [s for s in TRAINED if getattr(arm, s) and s not in {*arm.order, *(arm.expert_stages or ())}]
    wrong += [f"{stage}: settings of a stage that it does not run" for stage in unused]
    if arm.start is not None and (arm.start not in arms or arm.stages is None):
        wrong.append(f"start={arm.start!r}: expected another arm, and the stages that follow")
    wrong += convert_faults("student", arm.student, arm.kind) + row_faults("data", arm.data)
    for row, changes in arm.evaluate.items():
        if not NAME.fullmatch(str(row)) or not isinstance(changes, dict):
            wrong.append(f"evaluate.{row}: expected a plain name and fields of the config")
        else:
            wrong += convert_faults(f"evaluate.{row}", changes, arm.kind)
    if arm.experts is not None:
        odd = [n for n, e in arm.experts.items() if not NAME.fullmatch(str(n)) or not isinstance(e, dict)]
        wrong += [f"experts.{n}: expected a plain name and data" for n in odd]
        wrong = wrong or [f for n, e in arm.experts.items() for f in row_faults(f"experts.{n}", e)]
        if len(arm.experts) < 2 or "distill" not in arm.order or arm.lora:
            wrong.append("experts: expected at least two, the stage distill, and no lora")
        known = (None, ["distill"], ["distill", "on_policy"])
        if arm.expert_stages not in known or ("on_policy" in arm.order and arm.expert_stages):
            expected = "[distill], or [distill, on_policy] and no on_policy in stages"
            wrong.append(f"expert_stages={arm.expert_stages}: expected {expected}")
    if (arm.merge or arm.expert_stages) is not None and arm.experts is None:
        wrong.append("merge, expert_stages: expected experts as well")
    if arm.keep is not None:
        complete = set(arm.keep) == {"groups", "by"} and arm.keep["by"] in KEPT_BY and is_count(arm.keep["groups"])
        if not complete or arm.start:
            wrong.append(f"keep={arm.keep}: expected groups (at least 1) and by, one of {list(KEPT_BY)}, and no start")
    for key in ("freeze", "restore"):
        names = getattr(arm, key)
        fits = arm.kind == "hybrid" and names and set(names) <= MODULES and (key != "freeze" or "distill" in arm.order)
        if names is not None and not fits:
            expected = f"some of {sorted(MODULES)} of a hybrid student, freeze with the stage distill"
            wrong.append(f"{key}={names}: expected {expected}")
    if arm.merge is not None and arm.merge.get("method") not in MERGES:
        wrong.append(f"merge.method={arm.merge.get('method')!r}: expected one of {list(MERGES)}")
    return wrong


def is_count(x, least=1):
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def test_faults(evaluate):
    """Mistakes of the section that says how students are tested."""
    wrong = []
    if set(evaluate) != set(EVALUATE):
        wrong = [f"evaluate: expected exactly the keys {sorted(EVALUATE)}, got {sorted(map(str, evaluate))}"]
    for name, value in evaluate.items():
        values = value if isinstance(value, list) else [value]
        if not all(map(is_count, values)) or not values:
            wrong.append(f"evaluate.{name}={value!r}: expected numbers of at least 1")
    return wrong


def combined_faults(arena):
    """Mistakes that show once arms and setting are put together."""
    wrong = []
    for arm in arena.arms.values():
        if arm.teachers is not None and (not arm.teachers or not set(arm.teachers) <= set(arena.teachers)):
            wrong.append(f"arms.{arm.name}: teachers={arm.teachers}: expected some of {list(arena.teachers)}")
        seen, at = {arm.name}, arm
        while at.start is not None:
            at = arena.arms[at.start]
            if at.name in seen:
                return [f"arms.{arm.name}: start goes round in a circle"]
            seen.add(at.name)
            if odd := [name for name in arena.teachers if arm.fits(name) and not at.fits(name)]:
                wrong.append(f"arms.{arm.name}: starts from {at.name}, which is not made for {', '.join(odd)}")
        for stage in arm.every_stage:
            given, rows = arena.settings(arm, stage)
            wrong += row_faults(f"arms.{arm.name}.{stage}", rows)
            steps, where = given.get("max_steps"), f"arms.{arm.name}"
            if not isinstance(steps, int) or steps < 1:
                wrong.append(f"{where}.{stage}.max_steps={steps!r}: expected a number of steps, here or in the setting")
            elif stage in ("distill", *(arm.expert_stages or ())) and arm.experts and steps % len(arm.experts):
                wrong.append(f"{where}: {steps} steps are not {len(arm.experts)} equal parts, one for each expert")
            if stage == "calibrate" and (odd := sorted(set(given) - CALIBRATED)):
                wrong.append(f"{where}.calibrate: unknown keys {odd}, expected some of {sorted({*CALIBRATED, *ROWS})}")
    return wrong


def ordering_faults(arena):
    """Mistakes of the published orderings."""
    wrong, keys = [], {"claim", "better", "worse", "measures", "source"}
    for j, entry in enumerate(arena.orderings):
        if not isinstance(entry, dict) or set(entry) != keys:
            wrong.append(f"orderings[{j}]: expected exactly the keys {sorted(keys)}")
            continue
        for side in ("better", "worse"):
            arm, _, row = str(entry[side]).partition("/")
            if arm not in arena.arms or (row and row not in arena.arms[arm].evaluate):
                wrong.append(f"orderings[{j}].{side}: no arm or row {entry[side]!r}")
        if not isinstance(entry["measures"], list) or not entry["measures"]:
            wrong.append(f"orderings[{j}].measures: expected a list")
            continue
        known = {*MEASURES, *(f"{kind}@{length}" for kind in LONG for length in arena.evaluate["lengths"])}
        odd = [m for m in entry["measures"] if str(m) not in known]
        wrong += [f"orderings[{j}]: {m!r}, expected one of {list(MEASURES)} or KIND@LENGTH of a test" for m in odd]
    return wrong
