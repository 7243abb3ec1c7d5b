"""A student as graphs for other runtimes: one token, and a chunk of tokens, each with the state as input and output.

The graphs are traced from the model as it is, in float32, and hold torch's own operations alone. What a graph cannot
hold is refused by name. Dims: B rows ("batch"), T tokens, H query heads, G key/value heads, F features, K head dim, S
sinks, W window.
"""

import hashlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from xlstm_hybrid.checkpoint.files import MANIFEST, add_provenance, staged, write_json, write_manifest
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.checkpoint.weights import copy_settings
from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.hub.export import card_files, config_values
from xlstm_hybrid.model.adopt import adopt_cache
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.configuration import STEADY_ROPES, XLSTMHybridConfig
from xlstm_hybrid.model.one_token import PAPER

STEP = {"step": True, "chunk": False}  # the graphs: whether one takes one token per row
GRAPHS, WEIGHTS = "graphs.json", "weights.bin"
OPSET = 18  # of ONNX: what torch writes without a conversion
EMPTY_M = -1e30  # log-scale of a state in which nothing is written: -inf, which JSON does not have, works as well
INLINE = 1024  # bytes up to which a constant stays in its graph's file
PAGE = 4096  # bytes: where a weight begins, so that it can be mapped
TRACED_ROWS, TRACED_TOKENS = 2, 5  # of the example that is traced; the graphs take others
NOISY = (  # what warns of torchvision's operators, which we do not use, and of parameters that wait for their values
    "torch.onnx._internal.exporter._registration",
    "onnx_ir.passes.common.initializer_deduplication",
)
UNABLE = {  # what no file of ours would run in, and why
    "gguf": (
        "llama.cpp has no mLSTM, so that nothing would run the file: none of the 126 architectures of the package gguf 0.19.0 "
        "and none in src/llama-arch.cpp of llama.cpp (commit 00395eb) has one, its issue 7764 that asked for xLSTM was closed "
        "without it, and an architecture is C++ code in there, not part of a file"
    ),
    "mlx": (
        "mlx-lm has no mLSTM: mlx_lm/models of version 0.32.0 (commit d78bf58) has no file that names one, and its issue 805 that "
        "asked for xLSTM was closed without it; MLX's own operations would do, but a model file of ours for it would be "
        "untested, as this project has no Apple GPU"
    ),
}


@dataclass
class GraphsReport:
    """files: names of what was written.  bytes: of all of them.  state_bytes: of one row's state, at any length of its
    text.
    """

    files: list
    bytes: int
    state_bytes: int

    def __str__(self):
        return f"{', '.join(self.files)}: {self.bytes / 1e6:,.1f} MB; the state of a row has {self.state_bytes / 1e6:,.2f} MB"


# --- what a graph can hold ---------------------------------------------------------------------------------------


def refuse_config(config, what):
    """Raise one ConfigError that lists what of a student no graph of ours can hold."""
    fields = [(name, getattr(config, name), value) for name, value in PAPER.items()]
    wrong = [f"{name}={found!r}, expected {value!r}" for name, found, value in fields if found != value]
    if kept := [j for j, kind in enumerate(config.layer_types) if kind != "hybrid_sliding"]:
        types = ", ".join(sorted({config.layer_types[j] for j in kept}))
        wrong.append(
            f"layers {kept} are {types}, expected hybrid_sliding: what the teacher kept there has another state"
        )
    if kept := [j for j, groups in enumerate(config.kept_groups or ()) if groups]:
        wrong.append(f"layers {kept} have kept_groups, whose keys grow with the text")
    if config.num_experts:
        wrong.append(
            f"its MLPs have {config.num_experts} experts, and which of them a token takes depends on its values"
        )
    if getattr(config, "quantization_config", None):
        wrong.append("its weights are quantised, expected float32, bfloat16 or float16")
    for rope in config.uneven_ropes.values():
        wrong.append(f"rope_type={rope!r}, whose angles depend on the text's length; expected one of {STEADY_ROPES}")
    if wrong:
        raise ConfigError(
            f"{what}: {'; '.join(wrong)}. A graph has the paper's layer and a state of constant size; serve this student with "
            "xlstm-hybrid serve, or take it elsewhere with its code (export --format code)"
        )


# --- the state as tensors ----------------------------------------------------------------------------------------


def state_shapes(config):
    """`{name: (shape of a row, dtype, value of an empty state)}`, in the order of a graph's inputs.

    `count` is the number of tokens that a row has read; the others' names are those of `state.save_state`, whose layers
    count for themselves. Keys and values have all S + W slots from the beginning.
    """
    K, G, F = config.head_dim, config.num_key_value_heads, config.memory_features
    shapes = {"count": ((), torch.long, 0)}
    for j, (_, window, sinks) in enumerate(config.spans()[: config.num_hidden_layers]):
        H, slots = len(config.mixed_heads(j)), window + sinks
        layer = {"keys": (G, slots, K), "values": (G, slots, K), "C": (H, F, K), "n": (H, F), "m": (H,)}
        for name, shape in layer.items():
            shapes[f"layers.{j}.{name}"] = shape, torch.float32, EMPTY_M if name == "m" else 0
    return shapes


def empty_state(config, rows=1):
    """The state of rows that have read nothing, `{name: tensor}`."""
    return {
        name: torch.full((rows, *shape), value, dtype=dtype)
        for name, (shape, dtype, value) in state_shapes(config).items()
    }


def layers_of(state):
    """A state layer by layer: `[{name in the layer: tensor}]`, each with the count."""
    layers = {}
    for name, x in state.items():
        if name != "count":
            _, j, part = name.split(".")
            layers.setdefault(int(j), {"count": state["count"]})[part] = x
    return [layers[j] for j in sorted(layers)]


def tensors_of(cache):
    """`{name: tensor}` of a filled cache, under the names of a state."""
    state = {"count": cache.layers[0].count}
    for j, layer in enumerate(cache.layers):
        state |= {f"layers.{j}.{name}": x for name, x in layer.named_tensors().items() if name != "count"}
    return state


def state_of(cache, config):
    """What `cache` of a student has read, as its graphs take it: `{name: tensor}`, float32 and int64.

    Raises:
        CacheError: an empty cache, or one of another model.
    """
    for j, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise CacheError(f"state_of: layer {j} of the cache is empty: read something first, or take empty_state")
    state, shapes = {}, state_shapes(config)
    for name, x in tensors_of(cache).items():
        state[name] = x.detach().cpu() if name == "count" else x.detach().cpu().float()
        if name.endswith((".keys", ".values")) and name in shapes:  # an unfilled ring has fewer slots
            state[name] = nn.functional.pad(state[name], (0, 0, 0, shapes[name][0][1] - x.shape[2]))
    check_state(state, config, "state_of")
    return state


def check_state(state, config, what):
    """Raise CacheError unless a state has the tensors of a model of this configuration, for any number of rows."""
    found = {name: (tuple(x.shape[1:]), x.dtype) for name, x in state.items()}
    expected = {name: (shape, dtype) for name, (shape, dtype, _) in state_shapes(config).items()}
    if found != expected:
        name = next(name for name in (*expected, *found) if found.get(name) != expected.get(name))
        raise CacheError(
            f"{what}: {name} is {found.get(name)} (shape of a row, dtype), expected {expected.get(name)}: the state is another "
            "model's; take it of the model that its graphs are exported from"
        )
    if len({len(x) for x in state.values()}) != 1:
        raise CacheError(
            f"{what}: its tensors have {sorted({len(x) for x in state.values()})} rows, expected one number"
        )


def cache_of(state, model):
    """The cache that goes on from a state of the model's graphs, `{name: tensor}`, on the model's device and in its dtype.

    Raises:
        CacheError: a state of another model.
    """
    check_state(state, model.config, "cache_of")
    cache = adopt_cache(DynamicCache(config=model.config), model.config)
    seen = int(state["count"].max())
    for layer, tensors in zip(cache.layers, layers_of(state) if seen else (), strict=False):
        slots = layer.slots_after(seen)
        ring = {name: tensors[name][:, :, :slots].to(model.dtype) for name in ("keys", "values")}
        layer.fill({name: x.to(model.device, copy=True) for name, x in (tensors | ring).items()}, seen)
    return cache


# --- tracing -----------------------------------------------------------------------------------------------------


class StepGraph(nn.Module):
    """A student as a function of one token per row: tokens and state in, logits [B, V] and state out; nothing is changed
    in place.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, state):
        logits, after = self.read(input_ids, state)
        return logits[:, -1], after

    def read(self, input_ids, state, attention_mask=None):
        """`(logits [B, T, V], state)`."""
        config = self.model.config
        cache = adopt_cache(DynamicCache(config=config), config)
        for layer, tensors in zip(cache.layers, layers_of(state), strict=True):
            layer.fill(tensors, layer.slots)  # `count` says how many of the slots are in use
        logits = self.model(input_ids, attention_mask=attention_mask, use_cache=True, **named(cache)).logits
        return logits, tensors_of(cache)


class ChunkGraph(StepGraph):
    """The same of a piece of a text: logits [B, T, V]. Of each row the first `lengths` [B] tokens are read, what follows
    is padding.
    """

    def forward(self, input_ids, lengths, state):
        real = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
        return self.read(input_ids, state, real)


@torch.no_grad()
def trace(model, step, layers=None):
    """The `ExportedProgram` of a `StepGraph` or `ChunkGraph`, for any number of rows and, unless `step`, of tokens.

    Args:
        layers: trace the first ones alone, and return the residual stream before each of them and before the last norm,
            [B, T, D], beside logits and state; None: all of them.
    """
    model.set_attn_implementation("eager")  # plain products, and one form of the layer for a token and for many
    graph, between, depth = (StepGraph if step else ChunkGraph)(model), [], model.config.num_hidden_layers
    rows, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    ids = torch.zeros(TRACED_ROWS, 1 if step else TRACED_TOKENS, dtype=torch.long)
    lengths = {} if step else {"lengths": torch.full([TRACED_ROWS], TRACED_TOKENS - 1)}
    hooks = []
    try:
        if layers is not None:
            model.config.num_hidden_layers = layers  # as transformers does where early layers draft
            for module in (*model.model.layers[:layers], model.model.norm):
                hooks.append(module.register_forward_pre_hook(lambda _, inputs: between.append(inputs[0])))
            graph.register_forward_hook(lambda _, inputs, outputs: (*outputs, between))
        state = empty_state(model.config, TRACED_ROWS)
        program = torch.export.export(
            graph,
            (ids, *lengths.values(), state),
            dynamic_shapes={
                "input_ids": {0: rows} if step else {0: rows, 1: tokens},
                **{name: {0: rows} for name in lengths},
                "state": {name: {0: rows} for name in state},
            },
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # torch cannot prove strides of an unknown T to be what they are
        )
    finally:
        model.config.num_hidden_layers = depth
        for hook in hooks:
            hook.remove()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    program.example_inputs = None  # zeros, which a file would hold as a pickle
    return program


# --- ONNX: one layer of each kind is converted and repeated ------------------------------------------------------


def kind_of(model, j):
    """What a layer's graph depends on: two layers of the same kind differ in the values of their parameters alone."""
    config, layer = model.config, model.model.layers[j]
    fields = {name: x[j] for name, x in vars(config).items() if isinstance(x, list | tuple) and len(x) > j}
    parameters = [(name, tuple(x.shape)) for name, x in layer.named_parameters()]
    return repr((config.spans()[j], config.teacher_layer_types[j], sorted(fields.items()), parameters, layer))


def layer_nodes(graph, before, after, prefix):
    """Nodes of a layer in order: all that depend on its input `before`, its parameters or its state, whose names have
    `prefix`, up to its output `after`. Masks and places, which depend on the number of rows alone, are everybody's.
    """
    own, nodes = {before}, []
    own |= {x for x in (*graph.inputs, *graph.initializers.values()) if prefix in x.name}
    for node in graph:
        rows = node.op_type == "Shape" and node.inputs[0] in graph.inputs
        if not rows and not own.isdisjoint(node.inputs):
            nodes.append(node)
            own |= set(node.outputs) - {after}
    return nodes


def repeat_layers(graph, between, first, parameters):
    """Complete a graph that holds the first layers alone: the others are copies of their nodes.

    Args:
        between: values of the residual stream before each layer that is there, and behind the last one.
        first: per layer of the student, the number of the first one of its kind.
        parameters: `{name: tensor}` of the whole student.
    """
    import onnx_ir

    there, end, x = len(between) - 1, tuple(between[-1].uses()), between[-1]
    at = between[-1].producer()
    for j in range(there, len(first)):
        old, new = f"layers.{first[j]}.", f"layers.{j}."
        copies = {between[first[j]]: x}
        for value in (*graph.inputs, *graph.initializers.values()):
            if old in value.name:
                copies[value] = copy = onnx_ir.Value(
                    name=value.name.replace(old, new), shape=value.shape, type=value.type
                )
                if value in graph.inputs:
                    graph.inputs.append(copy)
                else:
                    copy.const_value = parameters[copy.name]
                    graph.register_initializer(copy)
        for node in layer_nodes(graph, between[first[j]], between[first[j] + 1], old):
            # a graph within it would read the values of the first layer
            assert all(a.type != onnx_ir.AttributeType.GRAPH for a in node.attributes.values()), node
            outputs = [onnx_ir.Value(name=f"{y.name}.{j}", shape=y.shape, type=y.type) for y in node.outputs]
            copies |= zip(node.outputs, outputs, strict=True)
            inputs = [copies.get(y, y) for y in node.inputs]
            copy = onnx_ir.Node(node.domain, node.op_type, inputs, node.attributes, outputs=outputs)
            graph.insert_after(at, copy)
            at = copy
        for value in [y for y in graph.outputs if old in y.name]:
            copies[value].name = value.name.replace(old, new)
            graph.outputs.append(copies[value])
        x = copies[between[first[j] + 1]]
    for node, index in end:
        node.replace_input_with(index, x)


def translations():
    """What torch's exporter lacks, or has in a form that rounds too early: `{operator: function of ONNX's operators}`."""
    from onnxscript import INT64, opset18

    def searchsorted(sorted_sequence, self):
        before = opset18.Less(opset18.Unsqueeze(sorted_sequence, [1]), opset18.Unsqueeze(self, [2]))
        return opset18.ReduceSum(opset18.Cast(before, to=INT64.dtype), [-1], keepdims=0)

    def log_sigmoid(self):  # its log(sigmoid(x)) loses the small numbers near 0 by which a long memory forgets
        return opset18.Neg(opset18.Softplus(opset18.Neg(self)))

    return {torch.ops.aten.searchsorted.Tensor: searchsorted, torch.ops.aten.log_sigmoid.default: log_sigmoid}


def onnx_model(model, step):
    """The ONNX model of a `StepGraph` or `ChunkGraph`."""
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import optimize

    kinds = [kind_of(model, j) for j in range(model.config.num_hidden_layers)]
    first = [kinds.index(kind) for kind in kinds]
    names, there = list(state_shapes(model.config)), max(first) + 1
    names = [name for name in names if name == "count" or int(name.split(".")[1]) < there]
    lengths = [] if step else ["lengths"]
    onnx = torch.onnx.export(
        trace(model, step, there),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_ids", *lengths, *names],
        output_names=["logits", *(f"next.{name}" for name in names), *(f"between.{j}" for j in range(there + 1))],
        dynamic_shapes={  # what the dims are called
            "input_ids": {0: "batch"} if step else {0: "batch", 1: "tokens"},
            **dict.fromkeys(lengths),
            "state": dict.fromkeys(names),
        },
        custom_translation_table=translations(),
        optimize=False,
        verbose=False,
    ).model
    parameters = model.named_parameters(prefix="model", remove_duplicate=False)
    parameters, graph = {name: onnx_ir.tensor(x.detach().numpy(), name=name) for name, x in parameters}, onnx.graph
    own = [value for name, value in graph.initializers.items() if name in parameters]
    for value in own:
        value.const_value = None  # nothing is calculated from it, and equal ones of two layers stay two
    optimize(onnx)
    CommonSubexpressionEliminationPass()(onnx)
    for value in own:
        value.const_value = parameters[value.name]
    between = graph.outputs[-there - 1 :]
    del graph.outputs[-there - 1 :]
    repeat_layers(graph, between, first, parameters)
    for part in (onnx, graph, *graph, *graph.inputs, *graph.outputs):
        part.metadata_props.clear()  # where in our source it comes from, by paths of this machine
    return onnx


# --- files -------------------------------------------------------------------------------------------------------


def save_torch(model, directory):
    """`step.pt2` and `chunk.pt2`, each with its weights: archives of JSON and plain numbers. Returns `(what graphs.json
    says of the format, suffix of the files)`.
    """
    for name, step in STEP.items():
        torch.export.save(trace(model, step), directory / f"{name}.pt2")
    return {"format": "torch-export"}, ".pt2"


def save_onnx(model, directory):
    """`step.onnx` and `chunk.onnx`, which share the weights in `weights.bin`. Returns `(what graphs.json says of the
    format, suffix of the files)`.
    """
    import onnx_ir

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    places = {}
    with open(directory / WEIGHTS, "wb") as file:
        for graph, step in STEP.items():
            onnx = onnx_model(model, step)
            for name, value in onnx.graph.initializers.items():
                tensor = value.const_value
                if tensor.nbytes < INLINE:
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).digest()
                if key not in places:
                    file.write(bytes(-file.tell() % PAGE))
                    places[key] = file.tell(), len(content)
                    file.write(content)
                where = {"dtype": tensor.dtype, "shape": tensor.shape, "name": name, "base_dir": directory}
                value.const_value = onnx_ir.ExternalTensor(WEIGHTS, *places[key], **where)
            onnx_ir.save(onnx, directory / f"{graph}.onnx")
    return {"format": "onnx", "opset": OPSET, "weights": WEIGHTS}, ".onnx"


SAVED = {"onnx": save_onnx, "torch-export": save_torch}


def describe(config, suffix):
    """What graphs.json says beside the format: files, inputs and outputs of the graphs, and the state."""
    V = config.vocab_size
    step = {"file": f"step{suffix}", "input_ids": ["batch", 1], "logits": ["batch", V]}
    chunk = {"file": f"chunk{suffix}", "input_ids": ["batch", "tokens"], "lengths": ["batch"]}
    chunk["logits"] = ["batch", "tokens", V]
    state = [
        {"name": name, "next": f"next.{name}", "dtype": str(dtype)[6:], "shape": ["batch", *shape], "initial": value}
        for name, (shape, dtype, value) in state_shapes(config).items()
    ]
    return {"graphs": {"step": step, "chunk": chunk}, "state": state}


def export_graphs(checkpoint, out, kind, overwrite=False):
    """Write `out`: a student's graphs `step` and `chunk`, `graphs.json` that says how to call them, its configuration,
    tokenizer, card and record.

    Args:
        checkpoint: directory of a student.
        kind: "onnx" or "torch-export".
        overwrite: replace an existing `out`, once the new one is complete.
    Returns:
        GraphsReport
    Raises:
        ConfigError: a student that a graph cannot hold.
        CheckpointError: no checkpoint of ours, or `out` exists; nothing is written.
        CheckpointWriteError: `out` cannot be written, or holds the checkpoint; what was there is untouched.
        ModuleNotFoundError: a package of the extra `onnx` is missing.
    """
    if kind == "onnx":
        import onnxscript  # noqa: F401, which torch's exporter imports: what is missing is said before the work
    started, checkpoint = time.monotonic(), Path(checkpoint).resolve()
    check_output(out, inputs=[checkpoint], overwrite=overwrite)
    values = config_values(checkpoint)
    config = XLSTMHybridConfig.from_dict(dict(values))
    refuse_config(config, f"{checkpoint.name}: --format {kind}")
    model = load_model(checkpoint, device="cpu")
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    with staged(out, overwrite, weights * (1 if kind == "onnx" else 2)) as directory:
        form, suffix = SAVED[kind](model, directory)
        write_json(directory / GRAPHS, {"format_version": 1, **form, **describe(config, suffix)})
        write_json(directory / "config.json", values)
        copy_settings(checkpoint, directory, checkpoint.name)
        for name in card_files(checkpoint):
            shutil.copyfile(checkpoint / name, directory / name)
        add_provenance(
            directory, "export", parent=checkpoint, config=form, seconds=round(time.monotonic() - started, 3)
        )
        write_manifest(directory)
        files = [p for p in directory.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
        graphs = sorted(p.name for p in files if p.suffix in (suffix, ".bin"))
    state = sum(x.numel() * x.element_size() for x in empty_state(config).values())
    return GraphsReport([*graphs, GRAPHS, MANIFEST], size, state)
