"""An exported checkpoint is the same model wherever transformers is: with our package or with the code it carries."""

import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_student
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_imports
from typer.testing import CliRunner

import xlstm_hybrid.hub.export
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, verify_files, write_manifest
from xlstm_hybrid.environment.versions import PACKAGES
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError
from xlstm_hybrid.hub.export import AUTO_MAP, code, export
from xlstm_hybrid.reports.card import write_card

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT = [{"role": "user", "content": "Reverse the letters.\nInput: a b c"}]
COMMIT = "0123456789abcdef" * 2 + "01234567"


def exercise(model, tokenizer):
    """What a user does with a model: read, generate, train. Tensors by name; bitwise the same for the same model on one
    machine.
    """
    torch.set_num_threads(1)
    ids = ((torch.arange(60) ** 2 % 487) + 5).view(2, 30)
    padded = tokenizer(
        ["12+30=", "recall aB; cD; eF; = a"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    results = {
        "logits": model(ids).logits,
        "greedy": model.generate(ids, max_new_tokens=9, do_sample=False),
        "beams": model.generate(**padded, max_new_tokens=4, num_beams=3, do_sample=False),
        "chat": tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"],
    }
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.03)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    results |= {"loss": loss, **{f"trained {name}": x for name, x in model.eval().named_parameters()}}
    return {name: x.detach().clone().contiguous() for name, x in results.items()}


WITHOUT_PACKAGE = """
import json, os, sys, warnings
plain, exported, out = sys.argv[1:]

class Refuse:  # an environment without our package, and without triton
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("xlstm_hybrid", "xlstm_kernels", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

said = {}
def attempt(what, act):
    try:
        said[what] = type(act()).__name__
    except Exception as error:
        said[what] = f"{type(error).__name__}: {error}"

attempt("plain", lambda: AutoModelForCausalLM.from_pretrained(plain))
attempt("plain tokenizer", lambda: AutoTokenizer.from_pretrained(plain))
attempt("not trusted", lambda: AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False))
attempt("not asked", lambda: AutoModelForCausalLM.from_pretrained(exported))
attempt("tokenizer, not trusted", lambda: AutoTokenizer.from_pretrained(exported, trust_remote_code=False))

CHAT = [{"role": "user", "content": "Reverse the letters.\\nInput: a b c"}]
EXERCISE
tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
results = exercise(model, tokenizer)
model.zero_grad()
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)  # a second copy of the code in one process
ids = ((torch.arange(60) ** 2 % 487) + 5).view(2, 30)
for name, one in (("saved again", again), ("after training", model)):  # the first copy must not have lost its operators to the second
    outputs = one(ids, labels=ids)
    outputs.loss.backward()
    results |= {name: outputs.logits.detach(), f"{name}, gradient": one.model.layers[0].self_attn.mlstm.q_map.grad.clone()}
    one.zero_grad()
with torch.no_grad():
    results["from the Hub"] = AutoModelForCausalLM.from_pretrained("me/student-1.5", trust_remote_code=True)(ids).logits
said |= {"config": AutoConfig.from_pretrained(exported, trust_remote_code=True).model_type, "module": type(model).__module__,
         "base": type(AutoModel.from_pretrained(exported, trust_remote_code=True)).__name__, "files": sorted(os.listdir(out + "/again"))}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for folder in (exported, out + "/again"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, sliding_window=5)
said["edited"] = [str(w.message) for w in caught if w.category.__name__ == "ConfigWarning"]
save_file(results, out + "/results.safetensors")
print("\\n" + json.dumps(said))  # after the question
""".replace("EXERCISE", inspect.getsource(exercise))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint as a stage leaves it, with things that must not travel."""
    folder = tmp_path_factory.mktemp("checkpoints") / "plain.v1"  # a dot, which no module name has
    tiny_student(
        torch.float32,
        gain=1.5,
        vocab_size=512,
        **{"layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"]},
    ).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(TEACHER / name, folder / name)
    GenerationConfig(max_new_tokens=7, temperature=0.7, do_sample=True, eos_token_id=2, pad_token_id=0).save_pretrained(
        folder
    )
    add_provenance(
        folder,
        "convert",
        parent="tiny-llama",
        config={"teacher": "someone/tiny-llama", "sliding_window": 7, "num_sink_tokens": 3},
    )
    write_card(folder)
    write_manifest(folder)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt"):
        (folder / name).write_bytes(b"not to be shared")
    return folder


@pytest.fixture(scope="module")
def exported(plain):
    folder = plain.parent / "exported.v1"
    return folder, export(plain, folder)


@pytest.fixture(scope="module")
def without_package(plain, exported, tmp_path_factory):
    """What a process says that has transformers and not our package, and the tensors that it computed."""
    out = tmp_path_factory.mktemp("without_package")
    downloaded = out / "hub/models--me--student-1.5"  # as huggingface_hub keeps a repository
    shutil.copytree(exported[0], downloaded / "snapshots" / COMMIT)
    (downloaded / "refs").mkdir()
    (downloaded / "refs/main").write_text(COMMIT)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(out),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(out / "hub"),
        "HF_MODULES_CACHE": str(out / "modules"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, plain, exported[0], out],
        capture_output=True,
        text=True,
        cwd=out,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), load_file(out / "results.safetensors")


# --- without the package -----------------------------------------------------------------------------------------


def test_the_carried_code_computes_generates_and_trains_bit_for_bit_as_the_package(without_package, plain):
    said, theirs = without_package
    assert said["module"].startswith("transformers_modules.")
    tokenizer = AutoTokenizer.from_pretrained(plain, padding_side="left")
    ours = exercise(AutoModelForCausalLM.from_pretrained(plain), tokenizer)
    assert ours["logits"].std() > 0.5
    differ = [name for name, x in ours.items() if not torch.equal(x, theirs[name])]
    assert not differ and len(ours) > 40
    before = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert not any(
        torch.equal(x, before[name.removeprefix("trained ")])
        for name, x in ours.items()
        if name.endswith("mlstm.q_map")
    )


def test_a_repository_of_the_hub_is_the_same_model(without_package):
    """There transformers fetches one file of code after the other, by its imports."""
    assert torch.equal(without_package[1]["from the Hub"], without_package[1]["logits"])


def test_what_it_saves_carries_the_code_on(without_package):
    said, theirs = without_package
    for what in ("", ", gradient"):
        assert torch.equal(theirs[f"saved again{what}"], theirs[f"after training{what}"])
    assert set(code()) <= set(said["files"])


def test_settings_that_are_not_those_of_the_training_are_told_by_the_carried_code_too(without_package):
    told = without_package[0]["edited"]
    assert [text.partition(":")[0] for text in told] == ["exported.v1", "again"]
    assert all("sliding_window was 7 in training, is 5" in text for text in told)


def test_all_three_auto_classes_find_their_class(without_package, exported):
    assert (without_package[0]["config"], without_package[0]["base"]) == ("xlstm_hybrid", "XLSTMHybridModel")
    assert json.loads((exported[0] / "config.json").read_text())["auto_map"] == AUTO_MAP
    for place in AUTO_MAP.values():
        file, name = place.split(".")
        assert f"class {name}(" in (exported[0] / f"{file}.py").read_text()


def test_who_has_neither_package_nor_trust_is_told_what_to_do(without_package):
    said, _ = without_package
    assert (
        said["plain"].startswith("ValueError") and "`xlstm_hybrid`" in said["plain"]
    )  # transformers' text; all a file can put in is the type's name
    for way in ("not trusted", "not asked"):  # with stdin closed, a question is an answer
        assert said[way].startswith("ValueError") and "trust_remote_code=True" in said[way]


def test_a_tokenizer_needs_no_trust(without_package):
    assert without_package[0]["plain tokenizer"] == without_package[0]["tokenizer, not trusted"] == "TokenizersBackend"


# --- with the package --------------------------------------------------------------------------------------------


def test_with_the_package_no_carried_code_runs_and_nobody_is_asked(exported, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"asked: {text}"))
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    assert type(model).__module__ == "xlstm_hybrid.model.modeling"
    AutoTokenizer.from_pretrained(exported[0])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in saved and not list(tmp_path.glob("*.py"))  # no promise of files that are not there
    assert not AutoConfig.from_pretrained(exported[0]).auto_map


# --- the files ---------------------------------------------------------------------------------------------------


def test_everything_a_user_needs_travels_and_nothing_else(plain, exported):
    folder, report = exported
    kept = {"model.safetensors", "generation_config.json", *TOKENIZER}
    assert {p.name for p in folder.iterdir()} == {
        *kept,
        *code(),
        "config.json",
        "README.md",
        "provenance.json",
        "manifest.json",
    }
    assert set(report.files) == {p.name for p in folder.iterdir()} and set(report.code) == set(code())
    assert report.left_out == ["notes.txt", "optimizer.pt", "rng_state.pth", "training_args.bin"]
    for name in kept - {"tokenizer_config.json"}:
        assert (folder / name).read_bytes() == (plain / name).read_bytes(), name
    without = {
        key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "auto_map"
    }
    assert without == json.loads((plain / "config.json").read_text())
    chat = [AutoTokenizer.from_pretrained(where).apply_chat_template(CHAT, tokenize=False) for where in (plain, folder)]
    assert chat[0] == chat[1] and "Reverse the letters" in chat[0]
    assert GenerationConfig.from_pretrained(folder).temperature == 0.7


def test_the_record_goes_on_and_the_manifest_holds(plain, exported):
    folder, _ = exported
    verify_files(folder)
    *before, last = read_provenance(folder)
    assert before == read_provenance(plain) and (last["stage"], last["parent"]) == ("export", "plain.v1")
    assert last["config"]["auto_map"] == AUTO_MAP
    assert str(folder.parent) not in (folder / "provenance.json").read_text()


def test_the_card_says_how_to_load_it_and_no_longer_that_it_needs_the_package(exported, tmp_path):
    text = (exported[0] / "README.md").read_text()
    assert text.count("trust_remote_code=True") == 2 and f"{len(code())} Python files" in text
    bare = tmp_path / "bare"
    tiny_student(torch.float32).save_pretrained(bare)
    for number, card in enumerate(
        (
            None,
            "# A card\n\n## How it was made\n\nWell.\n\n- It loads only where the package xlstm-hybrid is imported: so.\n- Last.\n",
        )
    ):
        if card:
            (bare / "README.md").write_text(card)
        export(bare, tmp_path / f"out{number}")
        text = (tmp_path / f"out{number}/README.md").read_text()
        assert "trust_remote_code=True" in text and "It loads only where" not in text
    export(tmp_path / "out1", tmp_path / "out2")
    assert (tmp_path / "out2/README.md").read_text() == text
    assert text.startswith("# A card\n\n## Load it without the package\n") and text.endswith(
        "\n\n## How it was made\n\nWell.\n\n- Last.\n"
    )


def test_shards_travel_with_their_index(plain, tmp_path):
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    export(tmp_path / "sharded", tmp_path / "out")
    shards = {p.name for p in (tmp_path / "sharded").glob("*.safetensors*")}
    assert len(shards) > 3 and shards == {p.name for p in (tmp_path / "out").glob("*.safetensors*")}
    loaded, want = (AutoModelForCausalLM.from_pretrained(where).state_dict() for where in (tmp_path / "out", plain))
    assert all(torch.equal(x, want[name]) for name, x in loaded.items())


def test_the_floor_in_the_card_is_that_of_the_package():
    for name in ("torch", "transformers"):
        assert f"{name} {PACKAGES[name].floor}" in xlstm_hybrid.hub.export.NEEDS


# --- the code ----------------------------------------------------------------------------------------------------


def test_a_carried_file_names_project_version_and_licence_and_imports_only_its_neighbours():
    files = code()
    for name, text in files.items():
        tree = ast.parse(text)
        assert (
            "Apache-2.0" in text and f"xlstm-hybrid {xlstm_hybrid.__version__}" in text and ast.get_docstring(tree)
        ), name
        near = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        modules = {
            module
            for node in near
            for module in ([node.module] if node.module else [alias.name for alias in node.names])
        }
        assert {f"{module}.py" for module in modules} <= set(files) and all(node.level == 1 for node in near), name
        assert "xlstm_kernels::" not in text, f"{name}: two copies in one process would register one operator twice"


def test_transformers_asks_for_torch_and_itself_only(exported):
    """It demands every package that `get_imports` finds: triton must not be among them, nor we; what transformers needs
    itself is there.
    """
    allowed = {"torch", "transformers", "huggingface_hub", "packaging", "safetensors", *sys.stdlib_module_names}
    for name in code():
        assert set(get_imports(exported[0] / name)) <= allowed, name


def without_imports_of_ours(text):
    """Lines of a module but for comments, and for imports of what is ours or beside it, which may go over several."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (
            node.level or node.module.startswith(("xlstm_hybrid", "xlstm_kernels"))
        ):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in lines if line.strip() and not line.strip().startswith("# ")]


def test_but_for_imports_and_names_of_operators_a_file_is_its_source():
    source = xlstm_hybrid.hub.export.origin("xlstm_hybrid.model.modeling").read_text()
    assert without_imports_of_ours(source) == without_imports_of_ours(code()["modeling_xlstm_hybrid.py"])


def test_a_comment_and_an_alias_survive_the_rewriting():
    node = ast.parse("from xlstm_kernels.mlstm.triton import mlstm_triton as run").body[0]
    assert xlstm_hybrid.hub.export.relative(node) == ["from .xlstm_kernels_mlstm_triton import mlstm_triton as run"]
    node = ast.parse("from xlstm_kernels import mix, mlstm").body[0]  # functions that hide the folders of their names
    assert xlstm_hybrid.hub.export.relative(node) == [
        "from .xlstm_kernels_mix_op import mix",
        "from .xlstm_kernels_mlstm_op import mlstm",
    ]
    node = ast.parse("from xlstm_kernels.mlstm import reference as r").body[0]  # a module
    assert xlstm_hybrid.hub.export.relative(node) == ["from . import xlstm_kernels_mlstm_reference as r"]
    assert "import mlstm_triton as run  # needs triton" in code()["xlstm_kernels_mlstm_op.py"]


@torch.no_grad()
def test_the_carried_triton_kernel_runs_and_is_the_packages(exported, monkeypatch):
    pytest.importorskip("triton")
    package = exported[0].with_name("carried_code")
    package.mkdir()
    for name, text in code().items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    carried = importlib.import_module("carried_code.xlstm_kernels_mlstm_op")
    from xlstm_kernels import mlstm

    device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in triton's interpreter, see conftest
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 16, generator=make).to(device) for _ in range(3))
    i, f = (torch.randn(1, 20, 2, generator=make).to(device) for _ in range(2))
    inputs = q.softmax(-1), k.softmax(-1), v, i, f + 3
    got, want, plain = (
        form(*inputs, backend=b)[0] for form, b in ((carried.mlstm, "triton"), (mlstm, "triton"), (mlstm, "chunkwise"))
    )
    assert torch.equal(got, want)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------------


def copy_of(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def edit(folder, **changes):
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


BROKEN = {
    "a flipped bit": (flip_a_bit, CheckpointError, r"copy: model.safetensors has SHA-256"),
    "another architecture": (
        lambda folder: edit(folder, model_type="llama"),
        CheckpointError,
        r"model_type is 'llama', expected 'xlstm_hybrid'",
    ),
    "a contradiction": (
        lambda folder: edit(folder, layer_types=["hybrid_sliding"]),
        ConfigError,
        r"layer_types has 1 entries",
    ),
    "a wrong type": (
        lambda folder: edit(folder, hidden_size="big"),
        CheckpointError,
        r"not a configuration of ours \(.*hidden_size",
    ),
    "no weights": (
        lambda folder: [(folder / f).unlink() for f in ("manifest.json", "model.safetensors")],
        CheckpointError,
        r"expected model.safe",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_is_written(plain, tmp_path, what):
    spoil, error, message = BROKEN[what]
    copy = copy_of(plain, tmp_path)
    spoil(copy)
    with pytest.raises(error, match=message):
        export(copy, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_what_is_there_stays_unless_overwriting_is_allowed(plain, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(plain, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(
            xlstm_hybrid.hub.export,
            "write_manifest",
            lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(CheckpointWriteError, match="No space left"):
            export(plain, tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"] and len(list(tmp_path.iterdir())) == 1
    export(plain, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/mine").exists()


def test_a_checkpoint_is_not_exported_onto_itself(plain):
    for out in (plain, plain.parent):
        with pytest.raises(CheckpointWriteError, match="holds the checkpoint plain.v1"):
            export(plain, out, overwrite=True)


def test_a_tokenizer_config_that_names_code_or_files_travels_without_them(plain, tmp_path):
    copy = copy_of(plain, tmp_path)
    (copy / "manifest.json").unlink()
    values = json.loads((copy / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "vocab_file": "/home/me/vocab.txt"}
    (copy / "tokenizer_config.json").write_text(json.dumps(values | named))
    export(copy, tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == values


def test_code_that_transformers_would_not_find_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(xlstm_hybrid.hub.export, "code", lambda: {**code(), "stray.py": '"""Nobody imports it."""\n'})
    with pytest.raises(CheckpointError, match="stray.py"):
        export(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports(plain, tmp_path):
    from xlstm_hybrid import cli

    ran = CliRunner().invoke(cli.app, ["export", str(plain), str(tmp_path / "out")])
    assert ran.exit_code == 0 and "training_args.bin" in ran.output, ran.output
    verify_files(tmp_path / "out")


# --- the Hub -----------------------------------------------------------------------------------------------------


class Hub:
    """Stands for HfApi; keeps what would be uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **kwargs):
        self.files |= {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return "committed"


def test_push_to_hub_sends_weights_as_safetensors_and_text_and_nothing_else(plain, exported, monkeypatch):
    hub = Hub()
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    AutoModelForCausalLM.from_pretrained(exported[0]).push_to_hub("me/student")
    assert set(hub.files) == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert (
        json.loads(hub.files["config.json"])["model_type"] == "xlstm_hybrid"
        and b"auto_map" not in hub.files["config.json"]
    )
    hub.files.clear()
    AutoTokenizer.from_pretrained(plain).push_to_hub("me/student")
    assert set(hub.files) == {*TOKENIZER, "README.md"}
