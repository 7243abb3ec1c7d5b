"""Files that do not belong together, or hold what they should not, are one named error in whatever loads them; no pickle is
read.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from xlstm_hybrid import pipeline
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data.documents import encode_chat
from xlstm_hybrid.errors import CheckpointError, ConfigError, DataError
from xlstm_hybrid.evaluation.equivalence import verify_checkpoint
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.reports.card import write_card

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
READERS = {
    "verify": verify_checkpoint,
    "load": load,
    "evaluate": lambda folder: pipeline.evaluate(folder, load_recipe(TINY.parents[1] / "smoke.yaml")),
}
readers = pytest.mark.parametrize("reader", READERS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "student"
    convert(TINY, folder, sliding_window=16, dtype="float32")
    (folder / "manifest.json").unlink()  # which would say that a file has changed
    return folder


@pytest.fixture
def student(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "student")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MISFITS = {
    "sizes": (
        {"hidden_size": 144},
        r"model.embed_tokens.weight is \[512, 256\] in model.safetensors, \[512, 144\] by config.json",
    ),
    "absurd": ({"vocab_size": 10**13}, r"\[512, 256\] in model.safetensors, \[10000000000000, 256\] by config.json"),
    "type": ({"sliding_window": "sixteen"}, "sliding_window"),
    "rope": ({"rope_parameters": {"rope_type": "nope"}}, "nope"),
    "chunks": ({"mlstm_chunk_size": 0}, "mlstm_chunk_size=0: expected at least 1 token"),
    "negative": ({"intermediate_size": -4}, "-4"),
}


@readers
@pytest.mark.parametrize("fault", MISFITS)
def test_a_configuration_that_is_not_the_weights_own_is_named(fault, reader, student):
    change, says = MISFITS[fault]
    edit(student / "config.json", **change)
    with pytest.raises((CheckpointError, ConfigError), match=says):
        READERS[reader](student)


@readers
@pytest.mark.parametrize(
    "content", ["[1]", "no json", '{"eos_token_id": {"a": 1}}', '{"eos_token_id": "</s>"}', '{"pad_token_id": 1.5}']
)
def test_a_generation_config_of_another_type_is_named(content, reader, student):
    (student / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="student: .*(generation_config|the model cannot be loaded)"):
        READERS[reader](student)


@pytest.mark.parametrize("reader", ["load", "evaluate"])
@pytest.mark.parametrize("content", ["no json", "[1]", '{"version": 3}'])
def test_a_tokenizer_that_is_none_is_named(content, reader, student):
    (student / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="student: the tokenizer cannot be loaded"):
        READERS[reader](student)


@readers
def test_a_pickle_in_the_place_of_weights_is_never_read(reader, student, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    torch.save(load_file(student / "model.safetensors"), student / "pytorch_model.bin")
    (student / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="student"):
        READERS[reader](student)


@readers
def test_a_weight_file_that_ends_early_is_named(reader, student):
    content = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="student"):
        READERS[reader](student)


def test_sound_files_pass(student):
    model, tokenizer = load(student)
    assert model.config.sliding_window == 16 and len(tokenizer) > 100


def test_memory_that_does_not_suffice_is_not_called_a_damaged_file(student, monkeypatch):
    from xlstm_hybrid.conversion.load import AutoModelForCausalLM

    def full(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MemoryError, match="no room"):
        load(student)


@pytest.mark.parametrize(
    "template",
    ["{% for n in range(10**9) %}{% endfor %}", "{{ messages.__class__ }}", "{{ 1 / 0 }}", "{{ messages[9].content }}"],
)
def test_a_template_that_its_sandbox_stops_is_named(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="template"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


@pytest.mark.parametrize("content", [b"---\n\xff\xfe: [\n---\n", b"\x00" * 40, b"---\nlicense: {{{\n"])
def test_a_damaged_card_is_replaced(content, student):
    (student / "README.md").write_bytes(content)
    write_card(student)
    assert (student / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_a_teacher_with_a_damaged_weight_names_it_whoever_reads(tmp_path):
    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight .*not finite"):
        convert(teacher, tmp_path / "student")
