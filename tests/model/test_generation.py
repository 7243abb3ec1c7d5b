"""Every way in which transformers generates gives what a model without a cache gives, for a student of every teacher
family.
"""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from conftest import enlarge, tiny_config, tiny_student, token_ids
from tiny_students import STACKS, every_family, ids_of, left_padded, student
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import xlstm_hybrid
from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import cache_of

ROOT = Path(__file__).parents[2]
families = pytest.mark.parametrize("family", every_family)
FAST = set(zip(every_family, [*STACKS] * 3, strict=True))  # every family and every stack; the other pairs are slow
students = pytest.mark.parametrize(
    ("family", "stack"),
    [pytest.param(f, s, marks=() if (f, s) in FAST else pytest.mark.slow) for f in every_family for s in STACKS],
)
N = 10  # new tokens: the windows wrap
GREEDY = {"max_new_tokens": N, "min_new_tokens": N, "do_sample": False}


def uncached(model, ids, **options):
    return model.generate(ids, use_cache=False, **(GREEDY | options))


# --- greedy, sampling, beams -------------------------------------------------------------------------------------


@students
def test_greedy_sampled_and_beam_generation_equal_generation_without_a_cache(family, stack):
    model, (ids, mask) = student(family, stack), left_padded([ids_of(11, 1), ids_of(6, 1, 4)])
    for options in (
        {},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ):
        torch.manual_seed(5)
        want = uncached(model, ids, attention_mask=mask, **options)
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, attention_mask=mask, **(GREEDY | options)), want), options


@students
def test_a_padded_batch_generates_what_each_row_generates_alone(family, stack):
    model, rows = student(family, stack), [ids_of(n, 1, seed=n) for n in (3, 12, 8)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, output in zip(rows, together, strict=True):
        assert torch.equal(
            output[12:], model.generate(row, attention_mask=torch.ones_like(row), **GREEDY)[0, row.shape[1] :]
        )


@students
def test_drafts_from_the_prompt_and_from_early_layers_give_greedy_decoding(family, stack):
    model, ids = student(family, stack), ids_of(6, 1).repeat(1, 3)
    want = uncached(model, ids)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}):
        assert torch.equal(model.generate(ids, **GREEDY, **options), want), options


@families
def test_drafts_of_early_layers_run_no_other_layers(family):
    model, ids, calls = student(family, "mixed"), ids_of(6, 1).repeat(1, 3), [0, 0, 0]

    def count(j):
        calls[j] += 1

    hooks = [layer.register_forward_pre_hook(lambda *_, j=j: count(j)) for j, layer in enumerate(model.model.layers)]
    found = model.generate(ids, assistant_early_exit=1, **GREEDY)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, uncached(model, ids))
    assert calls[0] > calls[1] == calls[2] and calls[1] <= N


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"guidance_scale": 1.7},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"cache_implementation": "dynamic"},
    ],
)
def test_processors_and_other_caches_change_nothing_about_the_model(options):
    if "offloaded" in str(options) and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("transformers asks a CUDA build for a stream, which no GPU gives")
    model, ids = tiny_student(), token_ids(2, 9)
    plain = {key: value for key, value in options.items() if key != "cache_implementation"}
    assert torch.equal(model.generate(ids, **GREEDY, **options), uncached(model, ids, **plain))


def test_generation_without_a_prompt_starts_from_the_first_token():
    model = tiny_student()
    assert torch.equal(model.generate(**GREEDY), model.generate(torch.ones(1, 1, dtype=torch.long), **GREEDY))


@families
@torch.no_grad()
def test_the_returned_scores_and_states_are_those_of_the_full_forward(family):
    model, ids = student(family), ids_of(9)
    out = model.generate(
        ids, **GREEDY, return_dict_in_generate=True, output_logits=True, output_scores=True, output_hidden_states=True
    )
    full = model(out.sequences, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(out.logits, 1), full.logits[:, 8:-1].float(), atol=1e-4, rtol=1e-4)
    assert len(out.logits) == len(out.scores) == len(out.hidden_states) == N
    for t, states in enumerate(out.hidden_states):
        assert len(states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(states[2][:, -1], full.hidden_states[2][:, 8 + t], atol=1e-5, rtol=1e-5)
    assert cache_of(out).get_seq_length() == 9 + N - 1


def test_rows_that_end_are_padded_and_the_others_go_on():
    model, ids = tiny_student(), token_ids(3, 9)
    free = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    end = int(free[0, 5])
    cut = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=0)[:, 9:]
    for row, want in zip(cut, free, strict=True):
        stop = (want == end).nonzero()
        length = int(stop[0]) + 1 if len(stop) else 30
        length = min(length, cut.shape[1])
        assert torch.equal(row[:length], want[:length]) and not row[length:].any()
    assert int((cut[0] == end).nonzero()[0]) <= 5


# --- prompts in pieces, conversations, embeddings ----------------------------------------------------------------


@students
def test_chunked_prefill_generates_the_same(family, stack):
    model, (ids, mask) = student(family, stack), left_padded([ids_of(21, 1), ids_of(15, 1, 4)])
    want = uncached(model, ids, attention_mask=mask)
    for size, cache in ((1, None), (4, "static"), (9, None)):
        found = model.generate(ids, attention_mask=mask, prefill_chunk_size=size, cache_implementation=cache, **GREEDY)
        assert torch.equal(found, want), (size, cache)


@students
def test_a_conversation_goes_on_from_the_returned_cache(family, stack):
    model, (ids, mask), again = student(family, stack), left_padded([ids_of(8, 1), ids_of(5, 1, 4)]), ids_of(6, seed=7)
    cache, read = None, []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kw: read.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in range(2):
        out = model.generate(ids, attention_mask=mask, cache=cache, return_dict_in_generate=True, **GREEDY)
        lengths, read[:] = list(read), []
        assert lengths == [ids.shape[1] if not turn else 7, *[1] * (N - 1)]  # what was read is not read again
        assert torch.equal(out.sequences, uncached(model, ids, attention_mask=mask))
        read.clear()
        cache, ids = cache_of(out), torch.cat([out.sequences, again + turn], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    hook.remove()


@families
def test_generation_starts_and_goes_on_from_embeddings(family):
    model, ids, more = student(family), ids_of(9), ids_of(4, seed=7)
    embed = lambda x: model.get_input_embeddings()(x).detach()  # noqa: E731
    first = model.generate(inputs_embeds=embed(ids), return_dict_in_generate=True, **GREEDY)
    assert torch.equal(first.sequences, model.generate(ids, **GREEDY)[:, 9:])
    whole = torch.cat([ids, first.sequences, more], 1)
    again = model.generate(inputs_embeds=embed(whole), cache=cache_of(first), **GREEDY)
    assert torch.equal(again, model.generate(whole, **GREEDY)[:, whole.shape[1] :])


def test_a_reset_cache_is_a_fresh_one():
    model, cache = tiny_student(), DynamicCache(config=tiny_config())
    for seed in (0, 1):
        ids = token_ids(2, 9, seed=seed)
        assert torch.equal(model.generate(ids, cache=cache, **GREEDY), model.generate(ids, **GREEDY))
        cache.reset()


def test_the_package_offers_the_state_functions_when_asked():
    from xlstm_hybrid import state

    for name in ("prefill", "snapshot", "restore", "fork", "remember", "rollback", "save_state", "load_state"):
        assert (
            getattr(xlstm_hybrid, name) is getattr(state, name)
            and name in dir(xlstm_hybrid)
            and name in xlstm_hybrid.__all__
        )
    with pytest.raises(AttributeError, match="no attribute 'prefil'"):
        xlstm_hybrid.prefil  # noqa: B018


# --- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "recipes/tiny_teacher/tiny-llama")


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A random student with the tokenizer's vocabulary."""
    config = tiny_config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    return enlarge(XLSTMHybridForCausalLM(config).double()).eval()


def encoded(tokenizer, text):
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def test_streamers_bring_the_text_piece_by_piece(speaker, tokenizer):
    inputs, printed = encoded(tokenizer, "12+30="), io.StringIO()
    want = tokenizer.decode(speaker.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :])
    with contextlib.redirect_stdout(printed):
        speaker.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert printed.getvalue().rstrip("\n") == want.rstrip("\n")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    speaker.generate(**inputs, **GREEDY, streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces) == want and len(pieces) > 2


def test_stop_strings_end_generation(speaker, tokenizer):
    inputs = encoded(tokenizer, "12+30=")
    full = tokenizer.decode(speaker.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :])
    stop = full[6:8]
    cut = speaker.generate(**inputs, max_new_tokens=N, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(cut[0, inputs["input_ids"].shape[1] :])
    assert stop in text and full.startswith(text) and len(text) < len(full)


def test_the_text_generation_pipeline_runs(speaker, tokenizer):
    generate, prompts = (
        pipeline("text-generation", model=speaker, tokenizer=tokenizer),
        ["12+30=", "Reverse the letters."],
    )
    for batch_size in (1, 2):
        found = generate(
            prompts, batch_size=batch_size, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_full_text=False
        )
        for prompt, [answer] in zip(prompts, found, strict=True):
            alone = speaker.generate(**encoded(tokenizer, prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False)
            assert answer["generated_text"] == tokenizer.decode(alone[0, -6:], skip_special_tokens=True)


# --- static caches, compiled steps -------------------------------------------------------------------------------


@students
def test_a_static_cache_generates_the_same(family, stack):
    model, (ids, mask) = student(family, stack), left_padded([ids_of(11, 1), ids_of(6, 1, 4)])
    want = uncached(model, ids, attention_mask=mask, num_beams=2)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, cache_implementation="static", num_beams=2, **GREEDY), want
    )


def addresses(cache):
    return [x.data_ptr() for layer in cache.layers for x in (*layer.state, layer.keys, layer.values, layer.count)]


@torch.no_grad()
def test_a_static_layer_writes_where_it_is_and_a_new_text_takes_the_same_place():
    model, cache = tiny_student(), StaticCache(config=tiny_config(), max_cache_len=64)
    place = None
    for sizes in ([11, 1, 1, 1, 4, 1, 11], [30], [21, 9]):
        ids, done = token_ids(2, 30, seed=len(sizes)), 0
        for n in sizes:
            logits = model(ids[:, done : done + n], cache=cache).logits
            done += n
            place = place or addresses(cache)
            assert addresses(cache) == place
        torch.testing.assert_close(logits[:, -1], model(ids).logits[:, -1], atol=1e-9, rtol=1e-9)
        assert cache.is_compileable and all(isinstance(layer, HybridCacheLayer) for layer in cache.layers)
        cache.reset()


def graphs_of(model, generate):
    """What `generate(compile_config)` returns, and the number of graphs that were compiled for it."""
    graphs = []

    def count(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiling = CompileConfig(backend=count, mode="default")
    compiling._compile_all_devices = True
    vars(model).pop("_compiled_call", None)
    found = generate(compile_config=compiling)
    vars(model).pop("_compiled_call", None)
    torch.compiler.reset()
    return found, len(graphs)


def test_generate_compiles_the_static_step_into_one_graph_of_constant_shapes():
    model, ids = tiny_student(num_hidden_layers=2), token_ids(2, 9)
    options = GREEDY | {"cache_implementation": "static"}
    want = model.generate(ids, **options)
    found, graphs = graphs_of(model, lambda **how: model.generate(ids, **options, **how))
    assert torch.equal(found, want)
    assert 1 <= graphs <= 2  # the second takes the number of tokens that have been seen as a variable


@pytest.mark.slow
@students
def test_generate_compiles_steps_of_padded_rows(family, stack):
    model, (ids, mask) = student(family, stack), left_padded([ids_of(9, 1), ids_of(6, 1, 4)])
    options = GREEDY | {"cache_implementation": "static", "attention_mask": mask}
    found, graphs = graphs_of(model, lambda **how: model.generate(ids, **options, **how))
    assert torch.equal(found, uncached(model, ids, attention_mask=mask)) and graphs >= 1


# --- refusals ----------------------------------------------------------------------------------------------------


def test_caches_that_cannot_hold_a_state_are_refused_by_name():
    model, ids = tiny_student(), token_ids(1, 9)
    with pytest.raises(ValueError, match="quantized|QuantizedCache"):
        model.generate(ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, **GREEDY)
    with pytest.raises(CacheError, match="continuous batching"):
        model.generate(ids, cache_implementation="paged", **GREEDY)
    foreign = DynamicCache()
    for layer in range(3):
        foreign.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), layer)
    with pytest.raises(CacheError, match="another model made it"):
        model.generate(ids, cache=foreign, **GREEDY)
