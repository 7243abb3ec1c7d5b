"""The cache has two names and every public method knows both; under a third one it is refused by name, as is all that
would be ignored.
"""

import functools
import inspect
import warnings

import pytest
import torch
import transformers
from conftest import enlarge, tiny_student, token_ids
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xlstm_hybrid import DistilXLSTMConfig, DistilXLSTMForCausalLM, XLSTMHybridForSequenceClassification
from xlstm_hybrid.errors import CacheError, CompatibilityError, ConfigError
from xlstm_hybrid.model.cache_names import CACHE, NAMES, OLD, cache_of, named, refuse_unknown, renamed, takes_cache
from xlstm_hybrid.state import prefill

names = pytest.mark.parametrize("name", NAMES)
PREFIX = 9


@functools.cache
def student(kind):
    if kind == "hybrid":
        return tiny_student()
    sizes = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "mlstm_chunk_size": 8, "mlstm_context": 64}
    return enlarge(DistilXLSTMForCausalLM(DistilXLSTMConfig(**sizes)).double()).eval()


@pytest.fixture(params=["hybrid", "distil"])
def model(request):
    return student(request.param)


def filled(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :PREFIX], use_cache=True, **named(cache))
    return cache


def without_warning(name):
    """Where the old name must not be remarked upon, a remark is an error."""
    if name == OLD and CACHE != OLD:
        return pytest.warns(FutureWarning, match=f"`{OLD}` is deprecated .* the old name of `cache`")
    return warnings.catch_warnings(action="error", category=FutureWarning)


def generated(model, ids, **cache):
    return model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, **cache)


# --- both names --------------------------------------------------------------------------------------------------


def test_the_name_inside_is_that_of_the_installed_transformers():
    """An in-tree model says what it is; outputs of all models are read by it."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape))
    assert CACHE in inspect.signature(llama.forward).parameters and CACHE in NAMES
    for one in (llama, student("hybrid"), student("distil")):
        out = one(token_ids(1, 3), use_cache=True)
        assert isinstance(cache_of(out), DynamicCache) and cache_of(out) is out[CACHE]
        assert cache_of(one(token_ids(1, 3), use_cache=False)) is None
    assert OLD == "past_key_values" and cache_of({}) is None and named(1) == {CACHE: 1}


@names
@torch.no_grad()
def test_a_forward_goes_on_from_a_cache_of_either_name(model, name):
    ids = token_ids(2, 14)
    want = model(ids, use_cache=False).logits[:, PREFIX:]
    for call in (model, lambda *args, **kwargs: model.lm_head(model.model(*args, **kwargs).last_hidden_state)):
        with without_warning(name):
            got = call(ids[:, PREFIX:], **{name: filled(model, ids)})
        torch.testing.assert_close(getattr(got, "logits", got), want, atol=1e-5, rtol=1e-5)


@names
def test_generate_goes_on_from_a_cache_of_either_name(model, name):
    ids, cache = token_ids(2, 14), filled(model, token_ids(2, 14))
    with without_warning(name):
        found = generated(model, ids, **{name: cache})
    assert torch.equal(found, generated(model, ids)) and cache.get_seq_length() == 17  # it was read and filled


@names
def test_inputs_for_generation_are_cut_by_a_cache_of_either_name(model, name):
    ids, cache = token_ids(2, 14), filled(model, token_ids(2, 14))
    how = {"attention_mask": torch.ones_like(ids), "next_sequence_length": 14 - PREFIX, "use_cache": True}
    with without_warning(name):
        found = model.prepare_inputs_for_generation(ids, **how, **{name: cache})
    assert cache_of(found) is cache and torch.equal(found["input_ids"], ids[:, PREFIX:])
    assert set(NAMES) & set(found) == {CACHE}


@names
@torch.no_grad()
def test_a_state_is_filled_under_either_name(name):
    model, ids = student("hybrid"), token_ids(2, 14)
    with without_warning(name):
        cache = prefill(model, ids[:, PREFIX:13], **{name: filled(model, ids)})
    assert torch.equal(generated(model, ids, **named(cache)), generated(model, ids)) and cache.get_seq_length() == 17


@names
@torch.no_grad()
def test_a_head_of_transformers_hands_on_a_cache_of_either_name(name):
    hybrid = student("hybrid")
    model = enlarge(XLSTMHybridForSequenceClassification(hybrid.config).double()).eval()
    ids = token_ids(2, 14).clamp_min(3)
    cache = DynamicCache(config=model.config)
    model.model(ids[:, :PREFIX], use_cache=True, **named(cache))
    got = model(ids[:, PREFIX:], **{name: cache}).logits
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_signature_shows_one_name_as_generate_reads_it(model):
    for method in (model.forward, model.model.forward):
        assert set(NAMES) & set(inspect.signature(method).parameters) == {CACHE}


# --- two caches --------------------------------------------------------------------------------------------------


def test_two_different_caches_are_refused_and_one_under_both_names_is_taken(model):
    ids = token_ids(2, 14)
    one, other = filled(model, ids), filled(model, ids)
    calls = {
        "forward": lambda **caches: model(ids[:, PREFIX:], **caches),
        "backbone": lambda **caches: model.model(ids[:, PREFIX:], **caches),
        "generate": lambda **caches: generated(model, ids, **caches),
    }
    for call in calls.values():
        with pytest.raises(
            CacheError, match=f"two different caches, as `cache` and as `{OLD}`; pass one, as `{CACHE}`"
        ):
            call(cache=one, past_key_values=other)
        assert one.get_seq_length() == other.get_seq_length() == PREFIX
    with warnings.catch_warnings(action="ignore"):
        assert torch.equal(generated(model, ids, cache=one, past_key_values=one), generated(model, ids))
        assert torch.equal(generated(model, ids, cache=None, past_key_values=other), generated(model, ids))


def test_renaming_changes_nothing_else():
    with warnings.catch_warnings(action="ignore"):
        for name in NAMES:
            assert renamed({"use_cache": True, name: 5}, "cache", "f") == {"use_cache": True, "cache": 5}
        assert (
            renamed({"cache": None, OLD: 5}, "cache", "f")
            == renamed({"cache": 5, OLD: None}, "cache", "f")
            == {"cache": 5}
        )
    assert renamed({"use_cache": True}, "cache", "f") == {"use_cache": True}


def test_a_decorated_function_is_what_it_was():
    @takes_cache
    def read(ids, cache=None, **kwargs):
        """Reads."""
        return ids, cache, kwargs

    assert (read.__name__, read.__doc__) == ("read", "Reads.") and list(inspect.signature(read).parameters)[1] == CACHE
    assert read(1, 2, use_cache=True) == read(1, cache=2, use_cache=True) == (1, 2, {"use_cache": True})


# --- a third name, and what would be ignored ---------------------------------------------------------------------


class Lookalike:
    """A cache of a library that we do not know."""

    layers = ()


def test_a_cache_under_a_name_that_nobody_knows_is_refused_with_the_version(model):
    ids = token_ids(2, 14)
    for cache in (filled(model, ids), Lookalike()):
        for call in (model, model.model):
            said = (
                rf"{type(model.model).__name__}.forward got a cache \({type(cache).__name__}\) as `kv_store`, a name that "
                rf"this version .* knows `cache` and `{OLD}`.*transformers {transformers.__version__} may have renamed it"
            )
            with pytest.raises(CompatibilityError, match=said):
                call(ids[:, PREFIX:], kv_store=cache)


def test_a_renamed_cache_stops_generation_at_its_first_call(model, rename_cache):
    rename_cache(swallowed=False)
    with pytest.raises(
        CompatibilityError, match="as `kv_store`, a name that this version of xlstm-hybrid does not know"
    ):
        generated(model, token_ids(2, 9))


@pytest.mark.parametrize("keyword", ["head_mask", "labelz", "output_gatez", "cache_position"])
def test_a_keyword_that_would_be_ignored_is_refused_by_name(model, keyword):
    ids = token_ids(2, 9)
    for call in (model, model.model):
        said = f"{type(model.model).__name__}.forward got `{keyword}`, which it would ignore; expected.*seq_idx.*leave it out"
        with pytest.raises(ConfigError, match=said):
            call(ids, **{keyword: torch.ones(2)})
        call(ids, **{keyword: None})  # not given


def test_what_is_listed_passes_and_a_switch_that_is_off_is_none():
    given = {"seq_idx": 1, "output_router_logits": False, "labelz": None, "teacher_forced": False}
    refuse_unknown(given, {"seq_idx"}, "It")
    with pytest.raises(ConfigError, match=r"It.forward got `output_router_logits`.*its own parameters, seq_idx: leave"):
        refuse_unknown({"output_router_logits": True}, {"seq_idx"}, "It")


@pytest.mark.parametrize("kind", ["hybrid", "distil"])
def test_a_cache_of_more_tokens_than_the_input_is_named(kind):
    """Who passes the question alone has forgotten that the input is the whole text."""
    model, ids = student(kind), token_ids(1, 9)
    cache = prefill(model, ids)
    for short in (ids[:, :4], ids):
        with pytest.raises(
            CacheError, match=f"the cache holds 9 tokens, the input {short.shape[1]}: pass the whole text"
        ):
            model.generate(short, **named(cache), max_new_tokens=2)
    longer = torch.cat([ids, ids[:, :1]], 1)
    assert model.generate(longer, **named(cache), max_new_tokens=2).shape == (1, 12)


def test_arguments_that_a_pipeline_has_bound_by_name_are_those_of_the_call():
    """transformers' pipeline parallelism binds a causal LM's arguments and hands them to its backbone as a dict."""
    model = tiny_student()
    ids, packed = token_ids(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    bound = inspect.signature(type(model).forward).bind_partial(model, ids, seq_idx=packed)
    bound.apply_defaults()
    arguments = {k: v for k, v in bound.arguments.items() if k not in ("self", "labels", "logits_to_keep")}
    assert arguments["kwargs"] == {"seq_idx": packed} and arguments["teacher_forced"] is False
    want = model.model(ids, seq_idx=packed)[0]
    assert torch.equal(model.model(**arguments)[0], want) and not torch.equal(want, model.model(ids)[0])
