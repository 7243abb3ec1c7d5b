"""Serving: what transformers offers works with a recurrent state or is refused by name."""

import threading
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_student, token_ids
from transformers import AutoTokenizer, GenerationConfig, QuantizedCache, TextIteratorStreamer, pipeline

from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.state import fork, prefill

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
CHAT = [{"role": "user", "content": "Reverse the letters.\nInput: a b c"}]
GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
STACKS = {
    "hybrid": {},
    "mixed": {
        "layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"],
        "teacher_sliding_window": 5,
        "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "no hybrid layer": {"layer_types": ["full_attention"] * 3},
}


@pytest.fixture(scope="module", params=STACKS)
def any_student(request):
    return tiny_student(**STACKS[request.param])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "student"
    convert(TEACHER, folder, sliding_window=16)
    return folder


# --- continuous batching -----------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8], [9, 10]]
WAYS = {
    "generate_batch": lambda model: model.generate_batch(
        PROMPTS, generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=2)
    ),
    "a manager": lambda model: model.init_continuous_batching(),
    "a context": lambda model: model.continuous_batching_context_manager().__enter__(),
    "a paged cache": lambda model: model.generate(
        input_ids=torch.tensor(PROMPTS[:1]), cache_implementation="paged", max_new_tokens=3
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_continuous_batching_is_refused_by_name_and_leaves_the_model_as_it_was(any_student, way):
    """transformers' own answer to a model without hybrid layers would be requests that failed, in a log."""
    before = any_student.config._attn_implementation
    with pytest.raises(CacheError, match=r"continuous batching .*left-padded batch to generate\(\).*fork"):
        WAYS[way](any_student)
    assert any_student.config._attn_implementation == before


def test_what_the_refusal_names_instead_gives_each_prompts_own_answer(any_student):
    alone = [any_student.generate(torch.tensor([p]), **GREEDY)[0, len(p) :] for p in PROMPTS]
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    batch = any_student.generate(ids, attention_mask=(ids != 0).long(), **GREEDY)[:, width:]
    assert torch.equal(batch, torch.stack(alone))
    prefix, ends = token_ids(1, 11), torch.tensor([[5, 6], [7, 8]])
    whole = torch.cat([prefix.expand(2, -1), ends], 1)
    forked = any_student.generate(whole, cache=fork(prefill(any_student, prefix), 2), **GREEDY)
    assert torch.equal(forked, any_student.generate(whole, **GREEDY))


# --- caches that generate makes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_every_cache_of_transformers_gives_the_same_tokens(any_student, implementation):
    kept = any(kind == "full_attention" for kind in any_student.config.layer_types)
    if implementation.startswith("offloaded") and (kept or torch.version.cuda) and not torch.cuda.is_available():
        pytest.skip(
            "transformers offloads the keys of full attention layers through CUDA streams, a Llama's too, and asks any CUDA build for one"
        )
    ids = token_ids(2, 12)
    got = any_student.generate(ids, cache_implementation=implementation, disable_compile=True, **GREEDY)
    assert torch.equal(got, any_student.generate(ids, **GREEDY))


def test_a_quantised_cache_is_refused_by_name_where_there_is_a_state(student):
    for backend in ("quanto", "hqq", "fp8"):
        with pytest.raises(CacheError, match="'quantized'.*leave it out"):
            student.generate(
                token_ids(1, 9), cache_implementation="quantized", cache_config={"backend": backend}, **GREEDY
            )
    with pytest.raises(ValueError, match="hybrid_sliding"):  # transformers' own, before anything of ours sees it
        QuantizedCache("quanto", student.config)


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"),
    reason="the backend that needs no other package came later",
)
def test_a_quantised_cache_serves_a_student_without_hybrid_layers():
    model, ids = tiny_student(torch.float32, gain=1.5, **STACKS["no hybrid layer"]), token_ids(1, 9)
    cache = QuantizedCache("fp8", model.config)
    with torch.no_grad():
        got, want = model(ids, cache=cache, use_cache=True).logits, model(ids).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # what is read in one call is not quantised yet
        step = torch.tensor([[11]])
        got, want = model(step, cache=cache).logits, model(torch.cat([ids, step], 1)).logits[:, -1:]
    assert 1e-4 < (got - want).abs().max() < 0.2 * want.std()


# --- pipelines and streams ---------------------------------------------------------------------------------------


def test_the_text_generation_pipeline_chats(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = pipeline("text-generation", model=str(checkpoint), device="cpu")
    answer = chat(CHAT, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]
    ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
    want = chat.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert (
        answer == {"role": "assistant", "content": tokenizer.decode(want, skip_special_tokens=True)}
        and answer["content"].strip()
    )


def test_a_stream_brings_the_text_piece_by_piece(checkpoint):
    chat = pipeline("text-generation", model=str(checkpoint), device="cpu")
    inputs = chat.tokenizer("12+30=", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(
        target=chat.model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
    )
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    whole = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces).strip() == chat.tokenizer.decode(whole, skip_special_tokens=True).strip() and pieces
