"""What a student's weights were trained with stands in the header of their files: weights fit one function, and a
configuration that is edited beside them is another one without an error.

transformers reads the headers in any case, and whatever copies the files copies them. A tool that writes the weights anew
drops them: then nothing is known, and nothing is said.
"""

import inspect
import json
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, modeling_utils

from xlstm_hybrid.errors import CheckpointError, ConfigWarning
from xlstm_hybrid.model.configuration import INDIFFERENT

KEY = "xlstm_hybrid.trained_with"  # of the values, JSON, in a header's metadata
LOCK = threading.RLock()


def trained_values(config):
    """`{field: value}` of a configuration of ours, as JSON has them: all of its own fields but those that change no
    result.
    """
    ours = [cls for cls in type(config).__mro__ if not issubclass(PreTrainedConfig, cls)]
    names = {name for cls in ours for name in inspect.get_annotations(cls)} - INDIFFERENT
    rope = json.dumps(getattr(config, "rope_parameters", None))
    if not any(kind in rope for kind in ("dynamic", "longrope", "yarn")):  # no other looks at it
        names.discard("max_position_embeddings")
    return json.loads(json.dumps({name: getattr(config, name) for name in sorted(names)}))


def header_of(values):
    """Metadata of a safetensors file whose weights were trained with these values, none where they are not known."""
    return {"format": "pt", **({KEY: json.dumps(values)} if values else {})}


def recorded_values(files):
    """`{field: value}` that weights in these files were trained with; {} where the headers say nothing.

    Raises:
        CheckpointError: a header that holds no fields where ours hold them.
    """
    values = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            note = (weights.metadata() or {}).get(KEY, "{}")
        try:
            values |= dict(json.loads(note))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{Path(file).name}: {KEY} in its header holds no settings ({error}); copy or download the file again"
            ) from error
    return values


def edited_fields(config, then):
    """`{field: (value in training, value of the configuration)}` where a configuration differs from `recorded_values`."""
    now = trained_values(config)
    return {field: (then[field], now[field]) for field in sorted(then.keys() & now) if then[field] != now[field]}


def warn_if_edited(config, files, name):
    """`recorded_values` of the files; one `ConfigWarning` where the configuration of checkpoint `name` has others."""
    then = recorded_values(files)
    if edited := edited_fields(config, then):
        warnings.warn(
            f"{name}: {told(edited)}. Its answers are not those of the trained student: put the old values back, or train it with "
            "the new ones; once saved they are its own",
            ConfigWarning,
            stacklevel=6,
        )
    return then


def told(edited):
    """What `edited_fields` found, in words."""
    return "; ".join(f"{name} was {then!r} in training, is {now!r}" for name, (then, now) in edited.items())


def save_weights(tensors, path, values, metadata=None, write=save_file):
    """Write a safetensors file whose header has `values`, see `header_of`. safetensors writes metadata in an order of
    chance, and equal weights are to be equal files: here it is sorted.
    """
    write(tensors, path, metadata={**(metadata or {}), **header_of(values)})
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        new = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(new) == length:  # the tensors' places count from the end of the header
            file.seek(8)
            file.write(new)


@contextmanager
def recording(values):
    """Meanwhile the weights that this thread saves through transformers have these values in their headers: it has no
    argument for it.
    """
    with LOCK:
        original, thread = getattr(modeling_utils, "safe_save_file", None), threading.get_ident()

        def save(tensors, filename, metadata=None):
            if threading.get_ident() != thread:
                return original(tensors, filename, metadata=metadata)
            return save_weights(tensors, filename, values, metadata, original)

        if original is None:  # another version: better no record than no checkpoint
            yield
            return
        modeling_utils.safe_save_file = save
        try:
            yield
        finally:
            modeling_utils.safe_save_file = original


class RemembersTraining:
    """A model whose checkpoints say what they were trained with: `save_pretrained` writes the values of the moment,
    loading warns once where the configuration has others.
    """

    trained_with = {}  # `recorded_values` of the checkpoint that this model was loaded from

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the present values of the configuration are what the weights were trained with."""
        with recording(trained_values(self.config)):
            return super().save_pretrained(*args, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **kwargs):
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        model.trained_with = warn_if_edited(model.config, files, Path(model.name_or_path).name)
        return loaded
