"""Students of which some layers are in memory at a time: read from a checkpoint, and written beside what others trained."""

from functools import partial

from safetensors import safe_open
from torch import nn

from xlstm_hybrid.checkpoint.files import digest, read_json, weight_files, write_json
from xlstm_hybrid.checkpoint.weights import copy_settings, using_cache, write_weights
from xlstm_hybrid.conversion.convert import empty_student
from xlstm_hybrid.conversion.load import parameter_dtype
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.model.layers import XLSTMHybridRotaryEmbedding, scaled_embeddings
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
from xlstm_hybrid.model.trained import save_weights


def read_tensor(files, name, dtype=None, model=XLSTMHybridForCausalLM):
    """A tensor of the checkpoint, as `model` has it where its dtype is `dtype`; None: as it is stored. A class does not
    know which families round the decays of their linear attention.
    """
    if name not in files:
        raise CheckpointError(f"the checkpoint lacks {name}: convert the teacher again")
    with safe_open(files[name], framework="pt") as file:
        value = file.get_tensor(name)
    return value if dtype is None else value.to(parameter_dtype(name, dtype, model))


def embedded(config, table, input_ids):
    """What enters the first layer, [B, T, D] on the CPU, of the embeddings' `table` [V, D]."""
    return scaled_embeddings(nn.functional.embedding(input_ids.cpu(), table), config.embedding_multiplier)


def model_of(config, files, layers, dtype):
    """A student that has the given layers only, in eval mode, read from `files` {name: path}; the rest of its modules are
    `Identity`.
    """
    model = empty_student(config)
    trunk, kinds = model.model, config.attention_types
    trunk.layers = nn.ModuleList([layer if n in layers else nn.Identity() for n, layer in enumerate(trunk.layers)])
    trunk.embed_tokens, trunk.norm, model.lm_head = nn.Identity(), nn.Identity(), nn.Identity()
    rotaries = {kind: XLSTMHybridRotaryEmbedding(config, layer_type=kind) for kind in kinds}
    trunk.rotary_emb = nn.ModuleDict(rotaries)
    state = {name: read_tensor(files, name, dtype, model) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.streamed_layers = sorted(layers)
    return model.eval()


def trained_files(work, groups):
    """{name of a trained tensor: its file in `work`}, of groups {"file": name or None, "sha256"}.

    Raises:
        CheckpointError: a file is not as it was written.
    """
    trained = {}
    for group in groups:
        if group["file"]:
            path = work / group["file"]
            if digest(path) != group["sha256"]:
                raise CheckpointError(f"{path.name}: differs from what was written; remove {work.name} to start again")
            with safe_open(path, framework="pt") as file:
                trained |= dict.fromkeys(file.keys(), path)
    return trained


def write_trained(checkpoint, folder, trained, values):
    """The checkpoint with trained tensors, {name: file}, in their places; one shard is in memory at a time.

    Args:
        values: of the config, that training depended on; see `model.trained`.
    """
    files, shapes, sizes = weight_files(checkpoint), {}, {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            shapes[name] = list(part.get_shape())
            sizes[name] = file.get_tensor(name).element_size() if not shapes[name] else part[:1].element_size()

    def make(name):
        stored = read_tensor(files, name)
        return read_tensor(trained, name).to(stored.dtype) if name in trained else stored

    write_weights(folder, shapes, sizes.__getitem__, make, partial(save_weights, values=values))
    write_json(folder / "config.json", using_cache(read_json(checkpoint / "config.json", checkpoint.name)))
    copy_settings(checkpoint, folder, checkpoint.name)
