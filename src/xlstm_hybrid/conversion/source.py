"""Where a teacher's tensors come from: a directory, a snapshot of the Hub, or a model in memory. Headers are read at
once, tensors one by one.
"""

import copy
import math
import re
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from xlstm_hybrid.checkpoint.files import contained, read_object, weight_files, write_json
from xlstm_hybrid.checkpoint.kinds import INDEX, MARKS, SINGLE, check_language_model, check_layout, model_names
from xlstm_hybrid.checkpoint.tokenizer import keep_tokenizer, note_rows
from xlstm_hybrid.checkpoint.weights import GENERATION, SETTINGS_FILES, copy_settings, settings_files, using_cache
from xlstm_hybrid.conversion.families import BESIDE_PICTURES, FAMILIES, family_of
from xlstm_hybrid.conversion.gguf import is_gguf, read_gguf, save_gguf_tokenizer
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError

STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONFIG_BYTES = 2**20
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
CONVOLUTION = re.compile(r"(.*\.linear_attn)\.q_conv1d\.weight")
# what a `GenerationConfig` has from any config.json, a student's too
OF_CONFIG = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions", "output_hidden_states"}
OF_CONFIG |= {"_from_model_config", "transformers_version"}


class DirectoryTeacher:
    """A checkpoint directory.

    tensors: name -> (shape, dtype; None if it is not a plain float); those of a trunk under the names of the whole
    model, those of experts joined.  config: the teacher's configuration, of its own class.

    Raises:
        CheckpointError: not a checkpoint of a language model (see `checkpoint.kinds`); a missing, unreadable or truncated
            file.
        UnsupportedTeacherError: see `family_of`.
    """

    def __init__(self, path, name, revision=None):
        self.path, self.name, self.revision, self.files, self.open = Path(path), name, revision, {}, ExitStack()
        check_layout(self.path, name, weights=False)
        self.config = self.read_config()
        family_of(self.config)
        check_language_model(self.path, name)
        files, self.tensors = weight_files(self.path), {}
        inner = "model.language_model." if self.config.model_type in BESIDE_PICTURES else None
        names = model_names(files, self.name, inner)
        self.names = {name: (stored, files[stored].name) for name, stored in names.items()}
        for name, (stored, file) in self.names.items():
            try:
                described = self.handle(file).get_slice(stored)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.name}/{file}: lacks {stored}, which the index places there; download the checkpoint again"
                ) from error
            self.tensors[name] = list(described.get_shape()), STORED.get(str(described.get_dtype()))
        self.parts = {}  # a tensor that the files hold in parts -> their names
        self.join_experts()
        self.join_convolutions()

    def join_experts(self):
        """Have one tensor for all experts of a layer, [E, 2 F, D] and [E, D, F], as transformers' models have, in the
        place of those of each expert. Experts that are incomplete or unlike stay as they are, for the table to name.
        """
        found = {}
        for name in self.tensors:
            if match := EXPERT.fullmatch(name):
                found.setdefault(match[1], {})[int(match[2]), match[3]] = name
        for prefix, names in found.items():
            experts = range(1 + max(number for number, _ in names))
            for joined, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                parts = [names.get((number, kind)) for number in experts for kind in kinds]
                described = [self.tensors.get(part) for part in parts]
                if any(x is None or x != described[0] for x in described):
                    continue
                (rows, columns), dtype = described[0]
                self.join(f"{prefix}.{joined}", parts, [len(experts), len(kinds) * rows, columns], dtype)

    def join_convolutions(self):
        """Have one tensor for the convolutions of queries, keys and values, as transformers' OLMo-Hybrid has."""
        for match in [match for name in self.tensors if (match := CONVOLUTION.fullmatch(name))]:
            parts = [f"{match[1]}.{kind}_conv1d.weight" for kind in "qkv"]
            described = [self.tensors.get(part) for part in parts]
            if any(x is None or x[1] != described[0][1] or x[0][1:] != described[0][0][1:] for x in described):
                continue
            rows = sum(shape[0] for shape, _ in described)
            self.join(f"{match[1]}.conv1d.weight", parts, [rows, *described[0][0][1:]], described[0][1])

    def join(self, name, parts, shape, dtype):
        """Have the tensor `name` in the place of `parts`, of which it is made up in this order."""
        self.parts[name], self.tensors[name] = parts, (shape, dtype)
        for part in parts:
            del self.tensors[part]

    def read_json(self, file):
        path = self.path / file
        if not path.is_file():
            raise CheckpointError(
                f"{self.name}: no {file}, expected a checkpoint of transformers; check the path, or download it again"
            )
        return read_object(
            path,
            CONFIG_BYTES,
            lambda reason: CheckpointError(
                f"{self.name}/{file}: cannot be read ({reason}); download the checkpoint again"
            ),
        )

    def read_config(self):
        """The configuration as data: only the family's own class interprets it, and nothing in it names code to run."""
        values = self.read_json("config.json")
        values = {name: value for name, value in values.items() if not name.startswith("_") and name != "auto_map"}
        kind = values.get("model_type")
        if kind not in FAMILIES:
            family_of(type("Unknown", (), {"model_type": kind}))
        try:
            return FAMILIES[kind].config_class.from_dict(values)
        except (StrictDataclassError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.name}/config.json: not a {kind} configuration ({reason}); correct or download it again"
            ) from error

    def handle(self, file):
        """The opened file; stays open, mapped and not in memory, until `close`."""
        if file not in self.files:
            try:
                self.files[file] = self.open.enter_context(safe_open(self.path / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.name}/{file}: not a complete safetensors file ({error}); download the checkpoint again"
                ) from error
        return self.files[file]

    def load(self, name):
        if name in self.parts:  # one part at a time beside the whole
            shape, dtype = self.tensors[name]
            whole, begin = torch.empty(math.prod(shape), dtype=dtype), 0
            for part in self.parts[name]:
                values = self.load(part).flatten()
                whole[begin : begin + len(values)] = values
                begin += len(values)
            return whole.view(shape)
        stored, file = self.names[name]
        return self.handle(file).get_tensor(stored)

    def close(self):
        self.open.close()

    def refuse_target(self, out):
        """Raise CheckpointWriteError if writing to `out` would replace this teacher."""
        if self.path.resolve().is_relative_to(out.resolve()):
            raise CheckpointWriteError(
                f"{out}: holds the teacher {self.name}; choose another directory for the student"
            )

    def generation_config(self):
        """The teacher's `GenerationConfig` with the cache that training turned off, or None. Without a file of it, older
        checkpoints have it in config.json.
        """
        if (self.path / GENERATION).is_file():
            return GenerationConfig.from_dict(using_cache(self.read_json(GENERATION)))
        # from the file: a configuration drops some of them
        settings = GenerationConfig.from_model_config(using_cache(self.read_json("config.json")))
        return settings if set(settings.to_diff_dict()) - OF_CONFIG else None

    def copy_files(self, directory):
        """Copy generation config, tokenizer, chat templates and processor; returns their names. The tokenizer is the
        teacher's, see `keep_tokenizer`; `directory` holds the student's config.json.
        """
        settings = self.generation_config()  # one that is none is refused
        copy_settings(self.path, directory, self.name)
        if settings is not None and not (directory / GENERATION).is_file():
            write_json(directory / GENERATION, settings.to_diff_dict())
        named = None
        if self.revision is not None:  # transformers knows some checkpoints by their name on the hub
            named = copy.deepcopy(self.config)
            named.name_or_path = self.name
        tokenizer = keep_tokenizer(self.path, directory, self.name, named)
        if tokenizer is not None:
            note_rows(tokenizer, self.config.vocab_size, self.name)
        return settings_files(directory)


class ModelTeacher:
    """A transformers model in memory; the interface of `DirectoryTeacher`, without path and tokenizer files.

    Raises:
        UnsupportedTeacherError: see `family_of`.
        CheckpointError: tensors that are on the meta device.
    """

    def __init__(self, model):
        self.model, self.config, self.name = model, model.config, f"{type(model).__name__} in memory"
        self.path = self.revision = None
        family_of(self.config)
        state = model.state_dict()
        self.state = {name: state[stored] for name, stored in model_names(state, self.name).items()}
        if empty := [name for name, x in self.state.items() if x.is_meta]:
            raise CheckpointError(
                f"{self.name}: {len(empty)} tensors are on the meta device, the first {empty[0]}; load it without offloading"
            )
        plain = set(STORED.values())
        self.tensors = {name: (list(x.shape), x.dtype if x.dtype in plain else None) for name, x in self.state.items()}

    def load(self, name):
        return self.state[name]

    def close(self):
        self.state = {}

    def refuse_target(self, out):
        pass

    def generation_config(self):
        """The teacher's `GenerationConfig` with the cache that training turned off, or None; the model keeps its own."""
        config = copy.deepcopy(getattr(self.model, "generation_config", None))  # a trunk has none
        if config is not None and config.use_cache is False:
            config.use_cache = True
        return config

    def copy_files(self, directory):
        if self.generation_config() is None:
            return []
        # not `save_pretrained`, which refuses what transformers loads with a warning
        write_json(directory / GENERATION, self.generation_config().to_diff_dict())
        return [GENERATION]


class GGUFTeacher(ModelTeacher):
    """A GGUF file: the model in memory, dequantised to float32, and the tokenizer that the file describes.

    Raises:
        ConfigError, CheckpointError: see `conversion.gguf.read_gguf`.
        UnsupportedTeacherError: see `family_of`.
    """

    def __init__(self, path, name, revision=None):
        model, stored = read_gguf(path, torch.float32, name)
        super().__init__(model)
        self.path, self.name, self.revision = Path(path), name, revision
        # the default of the student's dtype: that of the file where it is plain
        self.tensors = {name: (shape, stored) for name, (shape, _) in self.tensors.items()}

    refuse_target = DirectoryTeacher.refuse_target

    def copy_files(self, directory):
        return [*super().copy_files(directory), *save_gguf_tokenizer(self.path, directory)]


@contextmanager
def open_teacher(teacher, revision=None, gguf_file=None):
    """A `DirectoryTeacher`, `GGUFTeacher` or `ModelTeacher` from a directory, a Hub id (at a revision), a GGUF file or a
    transformers model.

    Args:
        gguf_file: name of a GGUF file in the directory or in the Hub's repository, which is read instead of other
            weights there.
    Raises:
        ConfigError: something else, or a revision or a GGUF file where there is none.
        CheckpointError, UnsupportedTeacherError: see the classes.
    """
    if not isinstance(teacher, (str, PathLike, PreTrainedModel)):
        raise ConfigError(
            f"teacher: expected a directory, a Hub id, a GGUF file or a transformers model, got {type(teacher).__name__}; "
            "a PEFT model becomes one with merge_and_unload(), a compiled one with ._orig_mod, a wrapped one with .module"
        )
    local = isinstance(teacher, PreTrainedModel) or Path(teacher).exists()
    if local and revision is not None:
        raise ConfigError(
            f"revision={revision!r}: only a Hub id has revisions, the teacher is a directory, a file or a model; leave it out"
        )
    if gguf_file is not None and (isinstance(teacher, PreTrainedModel) or Path(teacher).is_file()):
        raise ConfigError(
            f"gguf_file={gguf_file!r}: names a file in a directory or of a Hub id, and the teacher is a model or a file; leave it out"
        )
    if isinstance(teacher, PreTrainedModel):
        source = ModelTeacher(teacher)
    elif not local:
        found = Path(download(str(teacher), revision, gguf_file))
        commit = found.name if gguf_file is None else found.parts[-1 - len(Path(gguf_file).parts)]
        source = (DirectoryTeacher if gguf_file is None else GGUFTeacher)(found, str(teacher), commit)
    elif gguf_file is not None or is_gguf(teacher):
        path = Path(teacher) if gguf_file is None else contained(teacher, gguf_file)
        if not path.is_file():
            raise CheckpointError(f"{Path(teacher).resolve().name}: no file {gguf_file}; check the name")
        source = GGUFTeacher(path, path.name)
    else:
        source = DirectoryTeacher(teacher, Path(teacher).resolve().name)
    try:
        yield source
    finally:
        source.close()


def download(repository, revision, gguf_file=None):
    """Path of a Hub snapshot: weights in safetensors, configuration and tokenizer, nothing else; or of one GGUF file.

    Raises:
        CheckpointError: no such repository, or one that holds something else than a checkpoint.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repository):
        raise CheckpointError(f"teacher {repository!r}: no such directory, and not a Hub id; check the path")
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    wanted = ["config.json", "model.safetensors.index.json", "model*.safetensors", *SETTINGS_FILES, *MARKS]
    try:
        if gguf_file is not None:
            return hf_hub_download(repository, gguf_file, revision=revision)
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise CheckpointError(
            f"teacher {repository!r} (revision {revision or 'main'}): no such directory, and the Hub gave nothing "
            f"({type(error).__name__}: {reason}); check the name, your access to it, and HF_HUB_OFFLINE"
        ) from error
    if not any(Path(folder, name).is_file() for name in (SINGLE, INDEX)):
        files = None
        with suppress(OSError, ValueError):  # offline what was fetched has to do
            files = list_repo_files(repository, revision=revision)
        check_layout(folder, repository, files)
    return folder


def local_source(checkpoint, revision=None):
    """The directory of a checkpoint, or a GGUF file; of a hub id the snapshot at the revision.

    Raises:
        ConfigError: a revision of a directory. CheckpointError: see `download`.
    """
    if not Path(checkpoint).exists():
        return Path(download(str(checkpoint), revision))
    if revision is not None:
        raise ConfigError(
            f"--revision {revision}: only a hub id has revisions, {Path(checkpoint).name} is a directory; leave it out"
        )
    return Path(checkpoint)
