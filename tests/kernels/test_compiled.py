"""Compiled steps of one token on a CPU: right in every form, refused where they cannot be, absent without harm."""

import ctypes
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from xlstm_kernels import layer_step, layer_step_runs, linear_step, linear_step_runs
from xlstm_kernels.backends import compiled
from xlstm_kernels.backends.verified import ALLOWED
from xlstm_kernels.step import layer, linear

CPU = torch.device("cpu")
built = compiled.library(layer.SOURCE)
needs_compiler = pytest.mark.skipif(built.functions is None, reason=built.reason or "built")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and nothing remembered."""
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XLSTM_KERNELS_COMPILED", raising=False)
    monkeypatch.delenv("CC", raising=False)
    compiled.library.cache_clear()
    yield tmp_path / "cache"
    compiled.library.cache_clear()


def arguments(B=2, D=12, H=4, G=2, K=8, P=8, slots=6, dtype=torch.float32, seed=0):
    """Inputs and tensors in place of one `layer_step`, by their names."""
    make = torch.Generator().manual_seed(seed)
    number = partial(torch.randn, generator=make)
    given = {"x": number(B, 1, D)}
    given |= {name: number(B, 1, n, K) for name, n in (("raw_q", H), ("raw_k", G), ("v", G), ("q", H), ("k", G))}
    given |= {"cos": number(B, 1, K), "sin": number(B, 1, K), "q_map": number(H, K, P), "k_map": number(H, K, P)}
    given = {name: a.to(dtype) for name, a in given.items()}
    given |= {"i_weight": number(H, D), "f_weight": number(H, D), "f_bias": number(H)}
    given |= {"o_weight": number(H, 3 * K), "o_bias": number(H), "C": number(B, H, P, K), "n": number(B, H, P).abs()}
    given |= {"m": number(B, H), "keys": number(B, G, slots, K).to(dtype), "values": number(B, G, slots, K).to(dtype)}
    return given | {"index": torch.full((B,), 9), "count": torch.full((B,), 9), "sinks": 2, "scale": 0.3}


def torchs_step(given):
    *tensors, sinks, scale = given.values()
    return layer.layer_step_torch(*tensors, sinks=sinks, scale=scale)


def copied(given):
    return {name: a.clone() if isinstance(a, torch.Tensor) else a for name, a in given.items()}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "P"), [(64, 64), (128, 128), (8, 20), (6, 3)])
def test_a_layer_is_that_of_the_equations(dtype, K, P):
    errors = layer.check_layer(CPU, dtype, K, P)
    assert set(errors) == {"h", "C", "n", "keys", "values"}
    assert max(errors.values()) < (2e-5 if dtype == torch.float32 else ALLOWED[dtype] / 2), errors


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_is_a_matrix_product(dtype):
    errors = linear.check_linear(CPU, dtype)
    assert len(errors) == 8 and max(errors.values()) < (1e-6 if dtype == torch.float32 else 1e-2), errors


@needs_compiler
def test_a_check_has_dtypes_of_its_own():
    """`torch.set_default_dtype`, as some scripts do before they load a model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert max(layer.check_layer(CPU, torch.float32, 8, 8).values()) < 2e-5
        assert max(linear.check_linear(CPU, torch.float32).values()) < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_check_sees_a_wrong_kernel(monkeypatch):
    """One that leaves the state as it is, and one that adds no bias."""
    plain = layer.layer_step_torch

    def forgetful(*args, **kwargs):
        return plain(*args[:15], *(a.clone() for a in args[15:18]), *args[18:], **kwargs)

    monkeypatch.setattr(layer, "layer_step", forgetful)
    assert layer.check_layer(CPU, torch.float32, 8, 8)["C"] > ALLOWED[torch.float32]
    monkeypatch.setattr(linear, "linear_step", lambda x, weight, bias: x @ weight.T)
    assert max(linear.check_linear(CPU, torch.float32).values()) > ALLOWED[torch.float32]


@needs_compiler
def test_threads_share_the_work_and_change_no_bit(monkeypatch):
    given = arguments(B=3)
    one, several = copied(given), copied(given)
    x, weight, bias = torch.randn(3, 1, 40), torch.randn(7, 40), torch.randn(7)
    alone = layer_step(**one), linear_step(x, weight, bias)
    monkeypatch.setattr(layer, "WORTH_THREADS", 0)
    monkeypatch.setattr(linear, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = layer_step(**several), linear_step(x, weight, bias)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert all(torch.equal(one[name], several[name]) for name in ("C", "n", "m", "keys", "values", "count"))


@needs_compiler
def test_rows_may_lie_anywhere_in_a_larger_store():
    """What pages of a server are: state and slots side by side, five requests' worth, of which three have a token."""
    given, where = arguments(B=3), torch.tensor([4, 0, 3])
    kept = [given[name] for name in ("C", "n", "m", "keys", "values")]
    pages = torch.full((5, sum(a[0].numel() for a in kept) + 3), 7.0)
    parts = pages.split([*(a[0].numel() for a in kept), 3], 1)[:-1]
    stored = {
        name: part.unflatten(1, a.shape[1:])
        for name, a, part in zip(("C", "n", "m", "keys", "values"), kept, parts, strict=True)
    }
    for name, a in stored.items():
        a[where] = given[name]
    elsewhere = layer_step(**(copied(given) | stored), where=where)
    assert torch.equal(elsewhere, layer_step(**given))
    assert all(torch.equal(a[where], given[name]) for name, a in stored.items())
    assert (pages[[1, 2]] == 7).all() and (pages[:, -3:] == 7).all()
    with pytest.raises(ValueError, match="layer_step"):
        layer_step(**(given | stored), where=where + 1)


@needs_compiler
def test_a_forgotten_state_and_an_empty_one_leave_no_trace():
    """A document begins: what the state held is gone, and gates too far apart for float32 stay in order."""
    given = arguments()
    given["index"] = torch.tensor([0, 9])
    other = copied(given)
    other["C"][0] *= -3
    other["m"][0] += 50
    h, with_other = layer_step(**given), layer_step(**other)
    assert torch.equal(h, with_other) and torch.equal(given["C"], other["C"]) and given["count"].tolist() == [1, 10]
    given = arguments(seed=1)
    given["f_bias"].fill_(-2e4)  # below FORGET_ALL
    given["m"].fill_(float("-inf"))
    given["C"].zero_()
    given["n"].zero_()
    assert layer_step(**given).isfinite().all() and given["m"].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
@pytest.mark.parametrize("name", ["x", "k", "v", "q_map", "i_weight", "f_weight", "f_bias", "o_bias", "n", "m"])
def test_what_is_no_number_is_none_where_torch_has_none(name, value):
    given = arguments()
    given[name].view(-1)[1] = value
    torchs = copied(given)
    found, want = layer_step(**given), torchs_step(torchs)
    for ours, theirs in ((found, want), *((given[part], torchs[part]) for part in ("C", "n", "m"))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_compiler
def test_padding_writes_nothing():
    given = arguments()
    given["index"] = torch.tensor([-1, 9])
    before = copied(given)
    h = layer_step(**given)
    assert h.isfinite().all() and given["count"].tolist() == [9, 10]
    for name in ("C", "n", "m", "keys", "values"):
        assert torch.equal(given[name][0], before[name][0]) and not torch.equal(given[name][1], before[name][1]), name


WRONG = {
    "a key head too many": ("k", lambda a: a.repeat(1, 1, 2, 1), r"expected k of 32 numbers.*k float32 \[2, 1, 4, 8\]"),
    "another dtype": ("q", lambda a: a.double(), "q float64"),
    "gates in half precision": ("o_weight", lambda a: a.bfloat16(), "o_weight bfloat16"),
    "a state in pieces": ("C", lambda a: a.transpose(2, 3), "layouts as documented"),
    "an index of another dtype": ("index", lambda a: a.int(), "index int32"),
    "RoPE of other rows": ("cos", lambda a: a.repeat(2, 1, 1), r"cos float32 \[4, 1, 8\]"),
    "negative sinks": ("sinks", lambda a: -1, "sinks=-1"),
    "a ring without slots": ("sinks", lambda a: 6, "6 slots, of them 6 sinks, have none for token 9"),
}


@needs_compiler
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_written(name):
    field, change, words = WRONG[name]
    given = arguments()
    before = copied(given)
    with pytest.raises(ValueError, match=words):
        layer_step(**given | {field: change(given[field])})
    assert all(torch.equal(given[x], before[x]) for x in ("C", "n", "m", "keys", "values", "count"))


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        (torch.ones(1, 2, 3), torch.ones(4, 3), None),
        (torch.ones(1, 1, 3), torch.ones(4, 2), None),
        (torch.ones(1, 1, 3), torch.ones(3, 4).T, None),
        (torch.ones(1, 1, 3), torch.ones(4, 3).bfloat16(), None),
        (torch.ones(1, 1, 3).double(), torch.ones(4, 3).double(), None),
        (torch.ones(1, 1, 3), torch.ones(4, 3), torch.ones(3)),
    ],
)
def test_a_linear_map_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"linear_step: expected x \[B, 1, D\]"):
        linear_step(*wrong)


def test_where_torch_is_as_quick_or_nothing_is_compiled_nobody_is_sent_here():
    assert not linear_step_runs(torch.float64, 1) and not linear_step_runs(torch.float16, 1)
    assert not linear_step_runs(torch.float32, 9) and not linear_step_runs(torch.bfloat16, 5)
    assert not layer_step_runs(torch.float64, 8, 8) and not layer_step_runs(torch.float32, 7, 8)  # RoPE turns pairs


# --- building ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_library_is_built_once_and_found_again(fresh, monkeypatch):
    first = compiled.library(layer.SOURCE)
    (kept,) = fresh.iterdir()  # nothing half-written beside it
    assert kept.name == f"{first.name}-{compiled.digest(kept.read_bytes())}.so"
    compiled.library.cache_clear()
    monkeypatch.setattr(
        compiled, "run", lambda *command: subprocess.check_output(command[:2], text=True)
    )  # no building
    again = compiled.library(layer.SOURCE)
    assert again.name == first.name and again.functions is not None and again.threads == first.threads


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.6, None], ids=["empty", "cut short", "a folder"])
def test_a_damaged_library_is_built_again(fresh, share, tmp_path):
    """Loading one that is cut short ends the process with SIGBUS."""
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }")
    first = compiled.library(source)
    (kept,) = fresh.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # this process has loaded it: another file of its name
    if share is None:
        kept.mkdir()
    else:
        kept.write_bytes(whole[: int(len(whole) * share)])
    compiled.library.cache_clear()
    again = compiled.library(source)
    assert again.functions.two() == 2 and (again.name, again.threads) == (first.name, first.threads)
    assert [path.name for path in fresh.iterdir()] == [kept.name] and kept.is_dir() == (share is None)


@needs_compiler
def test_another_source_or_cpu_is_another_library(fresh, monkeypatch, tmp_path):
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }")
    two = compiled.library(source)
    assert two.functions.two() == 2
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "cpu", lambda: "another")
    assert compiled.library(source).name != two.name
    compiled.library.cache_clear()
    source.write_text("int two(void) { return 3; }")
    assert compiled.library(source).functions.two() == 3


@needs_compiler
def test_without_a_folder_a_library_is_built_for_the_process(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "file/below"))
    assert compiled.library(layer.SOURCE).functions is not None


@needs_compiler
def test_a_runtime_that_is_not_there_leaves_one_thread(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "KINDS", (("-DMISSING",), ("-DHERE",)))
    source = tmp_path / "part.c"
    source.write_text(
        "#ifdef MISSING\nint runtime(void);\nint two(void) { return runtime(); }\n#else\nint two(void) { return 2; }\n#endif"
    )
    found = compiled.library(source)
    assert found.functions.two() == 2 and not found.threads


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("XLSTM_KERNELS_COMPILED", "0", "XLSTM_KERNELS_COMPILED=0"),
        ("CC", "no-such-compiler", "the C compiler does not run: .*no-such-compiler"),
        ("CC", "gcc '", "the C compiler does not run: .*gcc '"),
        ("CC", f"{sys.executable} -c 0", "compiled.c did not build"),
        ("PATH", "", "no C compiler was found: install gcc or clang, or name one in CC"),
    ],
)
def test_without_a_library_there_is_a_reason(fresh, monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    found = compiled.library(layer.SOURCE)
    assert found.functions is None and not found.threads
    assert re.search(reason, found.reason), found.reason


@needs_compiler
def test_a_compiler_may_have_spaces_in_its_name_and_speak_in_any_encoding(fresh, monkeypatch, tmp_path):
    named = tmp_path / "a compiler"
    named.write_bytes(
        b"#!/bin/sh\nprintf '\\377 warning' >&2\nprintf '\\377'\nexec " + compiled.compiler()[0].encode() + b' "$@"\n'
    )
    named.chmod(0o755)
    monkeypatch.setenv("CC", f"'{named}' -Wall")
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }")
    assert compiled.library(source).functions.two() == 2


def test_an_exported_folder_without_the_source_has_a_reason(fresh, tmp_path):
    assert compiled.library(tmp_path / "compiled.c").reason == "compiled.c is not there"


def test_the_structure_is_that_of_the_source():
    """Fields in the order of compiled.c, and its flags."""
    text = layer.SOURCE.read_text(encoding="utf-8")
    struct = text[text.index("struct token {") :]
    struct = struct[: struct.index("};")]
    names = [
        part.split("[")[0].strip(" *;")
        for line in struct.splitlines()[1:]
        for part in line.split("/*")[0].split(";")[:-1]
    ]
    fields = [name.split()[-1].strip("*") for part in names for name in part.split(",")]
    assert fields == [name for name, _ in layer.Token._fields_]
    for name in (
        "BF16_TOKEN",
        "BF16_ROPE",
        "BF16_MAPS",
        "BF16_SLOTS",
        "SIGNED_MAP",
        "ROTATED_MEMORY",
        "GATE_OF_X",
        "NO_SLOT",
    ):
        assert f"{name} = {getattr(layer, name)}" in text
    assert ctypes.sizeof(layer.Token) == 8 * (len(fields) - 1) and Path(layer.SOURCE).name == "compiled.c"
