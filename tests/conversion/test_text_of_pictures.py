"""The text model of a teacher with pictures: the command of the refusal writes it, and its student is the teacher."""

import contextlib
import io
import re

import pytest
import torch
import transformers
from tiny_teachers import one_by_one, stored, teacher_config, tokens

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import UnsupportedTeacherError

VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 14}
FAMILIES = {
    "qwen3_5": ("Qwen3_5", VISION | {"num_heads": 2, "depth": 1, "out_hidden_size": 50}),
    "qwen3_5_moe": ("Qwen3_5Moe", VISION | {"num_heads": 2, "depth": 1, "out_hidden_size": 50}),
    "gemma3": ("Gemma3", VISION | {"num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 28}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_of_the_refusal_writes_a_text_model_whose_student_is_the_teacher(family, tmp_path):
    name, vision = FAMILIES[family]
    # transformers' Gemma 3 with pictures passes over a cap of the logits, which its text model has
    changes = {"final_logit_softcapping": None} if family == "gemma3" else {}
    text = teacher_config(f"{family}_text", tie_word_embeddings=True, **changes).to_dict()
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    whole = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedTeacherError, match="pictures beside text") as refused:
        convert(tmp_path / "whole", tmp_path / "student")
    command = re.search(r'python -c "(.*)", and copy', str(refused.value))[1]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(command.replace("'DIR'", repr(str(tmp_path / "whole"))).replace("'OUT'", repr(str(tmp_path / "text"))), {})
    assert any("language_model" in key for key in stored(tmp_path / "text")) == (family != "gemma3")
    convert(tmp_path / "text", tmp_path / "student", layer_types="teacher")
    student = XLSTMHybridForCausalLM.from_pretrained(tmp_path / "student").eval()
    if "moe" in family:
        one_by_one(student)
        whole.set_experts_implementation("eager")
    with torch.no_grad():
        difference = student(tokens()).logits - whole(input_ids=tokens()).logits
    assert difference.abs().max() < 1e-5
