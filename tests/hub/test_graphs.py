"""The graphs of a student are the model: tokens and state in, logits and state out."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_student, token_ids
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

from xlstm_hybrid.checkpoint.files import read_provenance, verify_files
from xlstm_hybrid.cli import app
from xlstm_hybrid.environment.versions import extra_of
from xlstm_hybrid.errors import CacheError, CheckpointError, CheckpointWriteError, ConfigError
from xlstm_hybrid.hub.graphs import (
    GRAPHS,
    cache_of,
    describe,
    empty_state,
    export_graphs,
    kind_of,
    refuse_config,
    state_of,
    state_shapes,
    trace,
    translations,
)
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.state import prefill

ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 2, "layer_windows": [7, 4], "layer_sinks": [3, 1], "eos_token_id": None}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of float32 and logits of order 1 to 10


def student(**changes):
    return tiny_student(torch.float32, gain=1.5, **(SMALL | changes))


def assert_same_state(found, want):
    assert found.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def read(model, ids, cache=None):
    """`(logits [B, T, V], cache)` of the model itself."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(ids, use_cache=True, **named(cache)).logits, cache


@torch.no_grad()
def assert_model(step, chunk, model):
    """Two functions of (ids, state) that return (logits, state) are the model: calls of any length, from an empty and from
    a filled state, before and behind the ring's end, with the state moved both ways."""
    for rows, parts in ((2, (5, 3, 30)), (1, (1, 12)), (3, (17,))):
        ids, state, cache, begin = token_ids(rows, 60, seed=rows), empty_state(model.config, rows), None, 0
        for tokens in parts:
            piece, begin = ids[:, begin : begin + tokens], begin + tokens
            want, cache = read(model, piece, cache)
            found, state = chunk(piece, state)
            torch.testing.assert_close(found, want, **CLOSE)
            assert_same_state(state, state_of(cache, model.config))
        for t in range(begin, begin + 12):
            want, cache = read(model, ids[:, t : t + 1], cache)
            found, state = step(ids[:, t : t + 1], state_of(cache_of(state, model), model.config))
            torch.testing.assert_close(found, want[:, -1], **CLOSE)
        assert_same_state(state, state_of(cache, model.config))
        # back into the model, which goes on with a long call
        rest = ids[:, begin + 12 :]
        torch.testing.assert_close(
            read(model, rest, cache_of(state, model))[0], read(model, ids)[0][:, begin + 12 :], **CLOSE
        )


@torch.no_grad()
def assert_padding_changes_nothing(chunk, model):
    """Rows of unlike lengths, none included, read in two padded calls, are the model's of each row alone."""
    ids, lengths, state = token_ids(3, 24), ((12, 3, 0), (5, 12, 1)), empty_state(model.config, 3)
    texts, logits = [[], [], []], [[], [], []]
    for begin, real in zip((0, 12), lengths, strict=True):
        found, state = chunk(ids[:, begin : begin + 12], state, torch.tensor(real))
        for row, n in enumerate(real):
            texts[row].append(ids[row, begin : begin + n])
            logits[row].append(found[row, :n])
    for row, parts in enumerate(texts):
        want, cache = read(model, torch.cat(parts)[None])
        torch.testing.assert_close(torch.cat(logits[row])[None], want, **CLOSE)
        own = {name: x[row : row + 1] for name, x in state.items()}
        assert_same_state(own, state_of(cache, model.config))


@torch.no_grad()
def decoded(step, chunk, ids, state, tokens):
    """Greedy tokens after `ids`, as somebody decodes who has the graphs alone."""
    logits, state = chunk(ids, state)
    logits, written = logits[:, -1], []
    for _ in range(tokens):
        written.append(logits.argmax(-1, keepdim=True))
        logits, state = step(written[-1], state)
    return torch.cat(written, 1)


# --- the state ---------------------------------------------------------------------------------------------------


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "teacher_model_type": "qwen3_moe"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_into_tensors_and_back_before_and_behind_the_rings_end(dtype):
    model = student().to(dtype)
    for tokens in (2, 10, 23):
        ids = token_ids(2, tokens + 5)
        cache = prefill(model, ids[:, :tokens])
        state = state_of(cache, model.config)
        assert {name: (tuple(x.shape[1:]), x.dtype) for name, x in state.items()} == {
            name: (shape, kind) for name, (shape, kind, _) in state_shapes(model.config).items()
        }
        again = cache_of(state, model)
        assert again.get_seq_length() == tokens
        assert torch.equal(read(model, ids[:, tokens:], again)[0], read(model, ids[:, tokens:], cache)[0])


def test_a_state_that_has_read_nothing_is_an_empty_cache():
    model = student()
    cache = cache_of(empty_state(model.config, 2), model)
    assert cache.get_seq_length() == 0
    assert torch.equal(read(model, token_ids(2, 9), cache)[0], read(model, token_ids(2, 9))[0])


def test_another_models_state_is_refused_by_the_name_of_its_first_misfit():
    model, other = student(), student(layer_windows=[7, 5])
    with pytest.raises(CacheError, match=r"layers\.1\.keys is \(\(2, 6, 16\).*expected \(\(2, 5, 16\)"):
        cache_of(empty_state(other.config), model)
    with pytest.raises(CacheError, match=r"layers\.0\.m is None"):
        cache_of({name: x for name, x in empty_state(model.config).items() if name != "layers.0.m"}, model)
    with pytest.raises(CacheError, match=r"have \[1, 2\] rows"):
        cache_of(empty_state(model.config) | {"layers.0.m": torch.zeros(2, 4)}, model)
    with pytest.raises(CacheError, match="layer 0 of the cache is empty"):
        state_of(cache_of(empty_state(model.config), model), model.config)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"memory_cell": "delta"}, "memory_cell='delta', expected 'mlstm'"),
        ({"mixer_branches": "memory"}, "mixer_branches='memory', expected 'both'"),
        ({"sparse_memory": 4}, "sparse_memory=4, expected 0"),
        ({"mixer_norm": True}, "mixer_norm=True, expected False"),
        ({"quantization_config": {"quant_method": "x"}}, "its weights are quantised"),
        (EXPERTS, "its MLPs have 4 experts"),
        ({"kept_groups": [[], [1], []]}, r"layers \[1\] have kept_groups"),
        (
            {"layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"]},
            r"layers \[1\] are full_attention, expected hybrid",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        refuse_config(tiny_config(**changes), "x")


def test_the_papers_layer_is_not_refused():
    refuse_config(tiny_config(memory_rope=False, memory_feature_map="softmax_signed", mixer_gate_input="x"), "x")


@pytest.mark.parametrize(
    "kind, said", [("gguf", "llama.cpp has no mLSTM"), ("mlx", "mlx-lm has no mLSTM"), ("tflite", "no such format")]
)
def test_a_format_that_would_run_nowhere_is_refused_with_the_reason(tmp_path, kind, said):
    result = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "out"), "--format", kind])
    assert isinstance(result.exception, ConfigError) and said in str(result.exception)
    assert str(result.exception).endswith("expected one of code, onnx, torch-export")


def test_what_the_package_gguf_knows_is_what_the_refusal_says():
    constants = pytest.importorskip("gguf.constants")
    assert not [name for name in constants.MODEL_ARCH_NAMES.values() if "lstm" in name.lower()]


def test_a_missing_package_is_said_before_the_work_and_belongs_to_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        export_graphs(tmp_path, tmp_path / "out", "onnx")
    assert extra_of(caught.value.name) == "onnx" and not (tmp_path / "out").exists()


def test_a_refused_student_and_its_own_directory_leave_everything_as_it_is(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "runs" / "student")
    with pytest.raises(CheckpointWriteError, match="is or holds student"):
        export_graphs(copy, tmp_path / "runs", "torch-export", overwrite=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_types": ["hybrid_sliding", "full_attention"]}))
    with pytest.raises(ConfigError, match=r"student: --format torch-export: layers \[1\] are full_attention"):
        export_graphs(copy, tmp_path / "out", "torch-export")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


# --- the graphs --------------------------------------------------------------------------------------------------


PART = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "traits",
    [pytest.param({}, marks=pytest.mark.slow), {"attention_output_gate": True, "rope_parameters": PART}],
    ids=["paper", "gated"],
)
def test_traced_programs_are_the_model_and_hold_torchs_own_operations(traits):
    model = student(num_hidden_layers=1, layer_windows=[7], layer_sinks=[3], **traits)
    programs = [trace(model, step) for step in (True, False)]
    for program in programs:
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if "xlstm" in name]
    step, chunk = programs[0].module(), with_lengths(programs[1].module())
    assert_model(step, chunk, model)
    assert_padding_changes_nothing(chunk, model)


def test_layers_are_of_one_kind_if_only_their_parameters_differ():
    model = student(num_hidden_layers=4, layer_windows=[7, 4, 7, 7], layer_sinks=[3, 1, 3, 1])
    kinds = [kind_of(model, j) for j in range(4)]
    assert [kinds.index(kind) for kind in kinds] == [0, 1, 0, 3]
    turned = student(num_hidden_layers=3, layer_windows=None, layer_sinks=None, rope_layers=[True, False, True])
    kinds = [kind_of(turned, j) for j in range(3)]
    assert [kinds.index(kind) for kind in kinds] == [0, 1, 0]


def with_lengths(chunk):
    """The graph of a chunk as a function of (ids, state) that reads all tokens, unless told how many of each row."""

    def call(ids, state, lengths=None):
        return chunk(ids, torch.full([len(ids)], ids.shape[1]) if lengths is None else lengths, state)

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "plain"
    student().save_pretrained(folder)
    (folder / "README.md").write_text("# A card\n")
    return folder


def files_with_paths(folder):
    """Names of files that hold a path of this machine."""
    marks = [str(ROOT).encode(), b"site-packages"]
    return [path.name for path in folder.iterdir() if any(mark in path.read_bytes() for mark in marks)]


@pytest.mark.slow
def test_an_export_for_torch_loads_without_this_package_and_is_the_model(checkpoint, tmp_path):
    out = tmp_path / "out"
    export_graphs(checkpoint, out, "torch-export")
    step, chunk = (torch.export.load(out / f"{name}.pt2").module() for name in ("step", "chunk"))
    assert_model(step, with_lengths(chunk), student())
    verify_files(out)
    assert files_with_paths(out) == []


def deep():
    """A student of two kinds of layers, the third and fourth of which are copies in its ONNX graphs."""
    return student(num_hidden_layers=4, layer_windows=[7, 4, 7, 4], layer_sinks=[3, 1, 3, 1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The directory of an ONNX export of `deep`, and its two graphs as functions."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    out, checkpoint = folder / "onnx", folder / "deep"
    deep().save_pretrained(checkpoint)
    (checkpoint / "README.md").write_text("# A card\n")
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--format", "onnx"])
    assert result.exit_code == 0, result.output
    listed = json.loads((out / GRAPHS).read_text())

    def function(graph):
        session = onnxruntime.InferenceSession(out / listed["graphs"][graph]["file"])

        def call(ids, *given):
            *lengths, state = given
            names = [x.name for x in session.get_inputs()]
            tensors = [x.numpy() for x in (ids, *lengths, *state.values())]
            logits, *after = session.run(None, dict(zip(names, tensors, strict=True)))
            return torch.from_numpy(logits), dict(zip(state, map(torch.from_numpy, after), strict=True))

        call = call if graph == "step" else with_lengths(call)
        call.session = session
        return call

    return out, function("step"), function("chunk")


@pytest.mark.slow
def test_onnxruntime_is_the_model(exported):
    assert_model(*exported[1:], deep())
    assert_padding_changes_nothing(exported[2], deep())


@pytest.mark.slow
def test_onnxruntime_decodes_the_models_tokens(exported):
    model, (_, step, chunk) = deep(), exported
    ids = token_ids(2, 25)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)[:, 25:]
    assert want.shape == (2, 20) and len(set(want.flatten().tolist())) > 5
    assert torch.equal(decoded(step, chunk, ids, empty_state(model.config, 2), 20), want)


@pytest.mark.slow
def test_an_empty_state_may_have_an_infinite_log_scale(exported):
    _, step, chunk = exported
    model, ids = deep(), token_ids(2, 9)
    state = empty_state(model.config, 2)
    infinite = {
        name: x if x.dtype == torch.long or x.max() == 0 else torch.full_like(x, float("-inf"))
        for name, x in state.items()
    }
    for call, tokens in ((step, 1), (chunk, 9)):
        assert torch.equal(call(ids[:, :tokens], infinite)[0], call(ids[:, :tokens], state)[0])


@pytest.mark.slow
def test_forget_gates_that_are_almost_open_are_not_rounded_to_open(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.tensor([15.0, 9.0, 0.0, -200.0, float("inf"), float("-inf")])
    file, table = tmp_path / "log_sigmoid.onnx", translations()
    module = torch.nn.LogSigmoid().eval()
    torch.onnx.export(module, (x,), file, dynamo=True, custom_translation_table=table, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = torch.nn.functional.logsigmoid(x.double()).float()
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_rows_of_different_lengths_go_on_together(exported):
    model, chunk = deep(), exported[2]
    texts = [token_ids(1, n, seed=n) for n in (3, 19)]
    states = [chunk(ids, empty_state(model.config))[1] for ids in texts]
    together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    ids = token_ids(2, 6)
    found, _ = chunk(ids, together)
    for row, text in enumerate(texts):
        want = read(model, torch.cat([text, ids[row : row + 1]], 1))[0][:, -6:]
        torch.testing.assert_close(found[row : row + 1], want, **CLOSE)


@pytest.mark.slow
def test_the_directory_says_how_to_call_the_graphs(exported):
    out, step, chunk = exported
    config, listed = deep().config, json.loads((out / GRAPHS).read_text())
    assert listed == {
        "format_version": 1,
        "format": "onnx",
        "opset": 18,
        "weights": "weights.bin",
        **describe(config, ".onnx"),
    }
    for name, call in (("step", step), ("chunk", chunk)):
        inputs, outputs = call.session.get_inputs(), call.session.get_outputs()
        called = {key: value for key, value in listed["graphs"][name].items() if key not in ("file", "logits")}
        assert [x.name for x in inputs] == [*called, *(entry["name"] for entry in listed["state"])]
        assert [x.name for x in outputs] == ["logits", *(entry["next"] for entry in listed["state"])]
        shapes = [*called.values(), *(entry["shape"] for entry in listed["state"])]
        assert [x.shape for x in inputs] == shapes
    # both graphs read one copy of the weights
    size = sum(x.numel() * 4 for x in deep().parameters())
    assert (out / "weights.bin").stat().st_size < size + 4096 * 100
    assert max((out / f"{name}.onnx").stat().st_size for name in ("step", "chunk")) < 200_000
    verify_files(out)
    assert read_provenance(out)[-1]["stage"] == "export" and (out / "README.md").read_text() == "# A card\n"
    assert files_with_paths(out) == []


@pytest.mark.slow
def test_nothing_is_replaced_unasked(exported):
    out = exported[0]
    before = (out / GRAPHS).stat().st_mtime_ns
    checkpoint = out.parent / "deep"
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--format", "onnx"])
    assert isinstance(result.exception, CheckpointError) and "--overwrite" in str(result.exception)
    assert (out / GRAPHS).stat().st_mtime_ns == before
