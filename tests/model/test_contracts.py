"""What transformers' own test suites ask of a model: configuration, weights, outputs, training. For a student of every
teacher family.
"""

import copy
import inspect
import json
import re
import warnings

import pytest
import torch
from conftest import assert_same_model, enlarge, tiny_config, tiny_student, token_ids
from tiny_students import CLOSE, STACKS, W, every_family, ids_of, left_padded, student
from tiny_teachers import stored
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from xlstm_hybrid import DistilXLSTMConfig, XLSTMHybridConfig, XLSTMHybridForCausalLM, XLSTMHybridModel
from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.cache_names import CACHE, cache_of
from xlstm_hybrid.model.layers import XLSTMHybridRotaryEmbedding

families = pytest.mark.parametrize("family", every_family)
stacks = pytest.mark.parametrize("stack", STACKS)
tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def own(model, **changes):
    """A copy that a test may change."""
    model = copy.deepcopy(model)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def small(tied=False, **changes):
    return tiny_student(num_hidden_layers=2, tie_word_embeddings=tied, **changes)


# --- configuration -----------------------------------------------------------------------------------------------


@families
@stacks
def test_a_config_survives_json_dictionaries_and_directories(family, stack, tmp_path):
    config = student(family, stack).config
    config.save_pretrained(tmp_path)
    copies = [
        AutoConfig.from_pretrained(tmp_path),
        XLSTMHybridConfig.from_dict(config.to_dict()),
        XLSTMHybridConfig(**json.loads(config.to_json_string())),
    ]
    for other in copies:
        where = {"_name_or_path": "", "dtype": None}
        assert other.to_dict() | where == config.to_dict() | where
        assert other.base_model_tp_plan == config.base_model_tp_plan
    assert not {"base_model_tp_plan", "base_model_pp_plan"} & config.to_dict().keys()


def test_a_config_needs_no_argument_and_takes_each_of_its_own():
    default = XLSTMHybridConfig()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(default, name) == getattr(XLSTMHybridConfig(**{name: getattr(default, name)}), name)
        setattr(default, name, 8)
        assert getattr(default, name) == 8
    assert XLSTMHybridConfig(num_labels=5).num_labels == len(XLSTMHybridConfig(num_labels=5).id2label) == 5
    assert XLSTMHybridConfig(use_cache=False, output_hidden_states=True).output_hidden_states
    assert tiny_config().to_diff_dict()["sliding_window"] == 7
    assert tiny_config().get_text_config(decoder=True) is not None


def test_a_model_cut_to_fewer_layers_than_its_config_names_is_refused_by_name(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="layer_types has 2 entries for num_hidden_layers=1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)


# --- construction and weights ------------------------------------------------------------------------------------


@families
@stacks
def test_every_parameter_and_buffer_has_an_initialisation(family, stack):
    """Every value is NaN first; after initialising none is, and an empty state dict gives the values of plain
    construction.
    """
    config = student(family, stack).config
    with init.no_init_weights():
        model = XLSTMHybridForCausalLM(config)
    with torch.no_grad():
        for x in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            x.fill_(float("nan"))
            x._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert not [name for name, x in (*model.named_parameters(), *model.named_buffers()) if torch.isnan(x).any()]
    torch.manual_seed(3)
    plain = XLSTMHybridForCausalLM(config)
    loaded = XLSTMHybridForCausalLM.from_pretrained(
        None, config=copy.deepcopy(config), state_dict={}, dtype=torch.float32
    )
    for name, x in loaded.state_dict().items():
        spread = [float(y.float().std()) if y.numel() > 1 else 0.0 for y in (x, plain.state_dict()[name])]
        assert spread[0] == pytest.approx(spread[1], rel=0.25), name


def test_a_model_on_the_meta_device_has_every_name_and_no_memory():
    with torch.device("meta"):
        model = XLSTMHybridForCausalLM(tiny_config())
    assert all(x.is_meta for x in model.parameters())
    assert model.state_dict().keys() == tiny_student().state_dict().keys()


@tying
def test_resized_embeddings_keep_what_was_there_and_train(tied, tmp_path):
    model, ids = own(small(tied)), token_ids(2, 12, vocab=50)
    before = model(ids).logits.detach()
    for size in (75, 55, 61):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == model.vocab_size == size
        assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        out = model(ids, labels=ids)
        assert out.logits.shape == (2, 12, size)
        torch.testing.assert_close(out.logits[..., :55], before[..., :55], atol=1e-9, rtol=0)
        out.loss.backward()
        model.zero_grad()
        del out  # its graph knows the embedding's old shape
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), model, ids)
    padded = own(small(tied))
    padded.resize_token_embeddings(61, pad_to_multiple_of=64)
    assert padded(ids).logits.shape[-1] == 64


@tying
def test_tied_weights_are_one_tensor_saved_once_and_tied_again(tied, tmp_path):
    model = small(tied)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in stored(tmp_path)) != tied
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        loaded.model.embed_tokens.weight[5] = 9.0
    assert bool((loaded.lm_head.weight[5] == 9.0).all()) == tied


@families
def test_sharded_and_single_files_give_back_every_bit(family, tmp_path):
    model, ids = student(family), ids_of(12)
    for place, size in (("one", "1GB"), ("many", "60KB")):
        model.save_pretrained(tmp_path / place, max_shard_size=size)
        files = list((tmp_path / place).glob("*.safetensors"))
        assert len(files) == 1 if place == "one" else len(files) > 2
        for how in ({}, {"device_map": "cpu"}, {"device_map": "auto"}) if place == "many" else ({},):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                tmp_path / place, dtype="auto", output_loading_info=True, **how
            )
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert_same_model(loaded, model, ids)
    assert loaded.config.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_narrow_model_keeps_its_gates_wide_however_it_is_loaded(dtype, tmp_path):
    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype).save_pretrained(tmp_path / "narrow")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto")
    assert loaded.dtype == loaded.config.dtype == dtype
    for name, x in loaded.named_parameters():
        gate, feature_map = "gate_" in name.rpartition(".")[2], name.endswith("_map")
        assert x.dtype == (torch.float32 if gate or (feature_map and dtype == torch.float16) else dtype), name
    out = loaded(token_ids(2, 20), use_cache=True)
    assert out.logits.dtype == dtype and torch.isfinite(out.logits).all()
    assert {x.dtype for x in cache_of(out).layers[0].state} == {torch.float32}
    wide = copy.deepcopy(loaded).float()(token_ids(2, 20)).logits
    scale = {torch.bfloat16: 0.3, torch.float16: 0.05, torch.float32: 5e-6}[dtype]  # of one standard deviation
    assert float((out.logits.float() - wide).std() / wide.std()) < scale


def test_base_model_and_head_load_from_each_others_checkpoints(tmp_path):
    model, ids = small(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", dtype=torch.float64, output_loading_info=True)
    assert isinstance(base, XLSTMHybridModel) and not info["missing_keys"]
    assert_same_model(base, model.model, ids)
    base.save_pretrained(tmp_path / "base")
    head, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert_same_model(head.model, base, ids)


def test_a_checkpoint_of_another_shape_is_refused_unless_asked_for(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=40)
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, vocab_size=40, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert torch.isfinite(other(token_ids(1, 9, vocab=40)).logits).all()


def test_a_deep_copy_and_a_loaded_state_dict_are_the_model(tmp_path):
    model, ids = small(), token_ids(2, 9)
    other = enlarge(XLSTMHybridForCausalLM(copy.deepcopy(model.config)).double(), seed=7).eval()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(model.state_dict(), strict=True)
    for same in (other, copy.deepcopy(model)):
        assert_same_model(same, model, ids)


INPUT_AND_FORGET, OUTPUT = {"igate_weight", "fgate_weight", "fgate_bias"}, {"ogate_weight", "ogate_bias"}
DISTIL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2}
KINDS = {  # configurations that differ in which parameters there are, and the gates that each has
    "mlstm": (tiny_config(), INPUT_AND_FORGET | OUTPUT),
    "linear": (tiny_config(memory_cell="linear"), OUTPUT),
    "delta": (tiny_config(memory_cell="delta", mixer_norm=True), INPUT_AND_FORGET | OUTPUT),
    "joint": (tiny_config(memory_cell="linear", mixer_combine="joint"), {"joint_scale"}),
    "full": (tiny_config(layer_types=["full_attention"] * 3), set()),
    "distil": (DistilXLSTMConfig(**DISTIL), INPUT_AND_FORGET | {"igate_bias", "gate_bias"}),
    "distil-mlstm": (DistilXLSTMConfig(block_pattern=["mlstm"], **DISTIL), INPUT_AND_FORGET | {"igate_bias"}),
    "distil-slstm": (DistilXLSTMConfig(block_pattern=["slstm"], **DISTIL), {"gate_bias"}),
}
kinds = pytest.mark.parametrize(("config", "gates"), KINDS.values(), ids=KINDS)
heads = pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM], ids=["base", "head"])


@heads
@kinds
def test_what_stays_in_float32_is_named_once_and_is_there(config, gates, auto):
    model = auto.from_config(config)
    strict, others = model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules
    assert strict == gates and not strict & others
    for name in strict | others:
        assert any(re.search(rf"(?:^|\.){name}(?:\.|$)", key) for key in model.state_dict()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@kinds
def test_gates_are_made_in_float32_at_least_whatever_dtype_a_model_is_made_in(config, gates, dtype):
    made = dict(AutoModelForCausalLM.from_config(config, dtype=dtype).named_parameters())
    of_gates = {name for name in made if name.rpartition(".")[2] in gates}
    assert {name for name, x in made.items() if x.dtype != dtype} == (of_gates if dtype != torch.float64 else set())
    assert {made[name].dtype for name in of_gates} <= {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "yarn"])
@torch.no_grad()
def test_a_rotary_embedding_is_made_of_a_config_alone_and_scales_as_llamas_does(rope):
    fields = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12, "max_position_embeddings": 40}
    plain = {"rope_type": "default", "rope_theta": 100.0}
    scaled = plain | ({} if rope == "default" else {"rope_type": rope, "factor": 10.0})
    ours = XLSTMHybridRotaryEmbedding(XLSTMHybridConfig(**fields, rope_parameters=dict(scaled)))
    theirs, unscaled = (LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(x))) for x in (scaled, plain))
    for length in (20, 60):  # within the context, and past it
        found, want, without = (each(torch.ones(1), torch.arange(length)[None]) for each in (ours, theirs, unscaled))
        for x, y, z in zip(found, want, without, strict=True):
            assert x.shape == (1, length, 12) and torch.equal(x, y)
            assert torch.equal(x, z) == (rope == "default" or (rope == "dynamic" and length == 20))


def test_a_rotary_embedding_of_a_config_alone_is_that_of_the_first_layer():
    thetas = {"sliding_attention": 16.0, "full_attention": 1e4}
    config = tiny_config(
        teacher_layer_types=["sliding_attention", "full_attention", "full_attention"],
        teacher_sliding_window=5,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    )
    exponents = torch.arange(0, 16, 2) / 16
    first, full = XLSTMHybridRotaryEmbedding(config), XLSTMHybridRotaryEmbedding(config, layer_type="full_attention")
    torch.testing.assert_close(first.inv_freq, 16.0**-exponents)
    torch.testing.assert_close(full.inv_freq, 1e4**-exponents)


@heads
@torch.no_grad()
def test_the_old_name_of_the_cache_is_taken_with_the_warning_of_transformers_own_models(auto):
    llama = LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    said = []
    for config in (llama, tiny_config(), DistilXLSTMConfig(**DISTIL)):
        model = auto.from_config(config).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = model(token_ids(1, 5), past_key_values=DynamicCache(config=config), use_cache=True)
        assert cache_of(out).get_seq_length() == 5
        warned = [str(w.message) for w in caught if w.category is FutureWarning]
        said.append(any(message.startswith("`past_key_values` is deprecated") for message in warned))
    assert said == [CACHE == "cache"] * 3


# --- outputs -----------------------------------------------------------------------------------------------------


@families
@stacks
@torch.no_grad()
def test_tuples_hold_what_the_dictionary_holds(family, stack):
    model, ids = student(family, stack), ids_of(9)
    options = {"use_cache": False, "output_hidden_states": True, "labels": ids}
    named, plain = model(ids, **options), model(ids, return_dict=False, **options)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    torch.testing.assert_close(plain, named.to_tuple(), atol=0, rtol=0)
    base = model.model(ids, use_cache=False, return_dict=False)
    assert torch.equal(base[0], model.model(ids, use_cache=False).last_hidden_state)


@families
def test_hidden_states_are_the_residual_stream_and_keep_gradients(family):
    model, ids = student(family), ids_of(9)
    out = model(ids, output_hidden_states=True)
    states = out.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(h.shape == (2, 9, model.config.hidden_size) for h in states)
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids))
    # the last one has been through the norm, as in transformers
    torch.testing.assert_close(model.lm_head(states[-1]), out.logits)
    states[0].retain_grad()
    states[1].retain_grad()
    out.logits[:, -1].sum().backward()
    assert float(states[0].grad.abs().max()) > 0 and float(states[1].grad.abs().max()) > 0


@families
@torch.no_grad()
def test_attentions_are_the_windows_softmax_and_sinks(family):
    model = own(student(family))
    model.set_attn_implementation("eager")
    T, config = 12, model.config
    attentions = model(ids_of(T), output_attentions=True).attentions
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (s <= t) & ((t - s < W) | (s < config.num_sink_tokens))
    assert len(attentions) == config.num_hidden_layers
    for weights in attentions:
        assert weights.shape == (2, config.num_attention_heads, T, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **CLOSE)
        assert not weights[..., ~seen].any() and weights[..., seen].max() > 0.3
        # past the window
        assert (weights[..., config.num_sink_tokens + W - 1 :, : config.num_sink_tokens].amax((0, 1, 2)) > 0).all()


def logits_with(family, stack, *implementations):
    """Logits of the real tokens of a padded batch, one tensor per attention implementation, and their spread."""
    model, (ids, mask) = own(student(family, stack, torch.float32, 1.5)), left_padded([ids_of(20, 1), ids_of(13, 1, 3)])
    found = []
    for name in implementations:
        model.set_attn_implementation(name)
        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    return *found, float(found[0].std())


@families
@stacks
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(family, stack):
    sdpa, eager, spread = logits_with(family, stack, "sdpa", "eager")
    torch.testing.assert_close(eager, sdpa, atol=2e-4 * spread, rtol=1e-3)


@families
# full attention compiles a kernel
@pytest.mark.parametrize("stack", ["hybrid", pytest.param("mixed", marks=pytest.mark.slow)])
@torch.no_grad()
def test_flex_attention_agrees(family, stack):
    sdpa, flex, spread = logits_with(family, stack, "sdpa", "flex_attention")
    torch.testing.assert_close(flex, sdpa, atol=2e-4 * spread, rtol=1e-3)


@families
@stacks
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(family, stack):
    model, ids = student(family, stack), ids_of(17, rows=4)
    together = model(ids, output_hidden_states=True)
    for row in range(4):
        alone = model(ids[row : row + 1], output_hidden_states=True)
        torch.testing.assert_close(alone.logits[0], together.logits[row], **CLOSE)
        torch.testing.assert_close(alone.hidden_states[2][0], together.hidden_states[2][row], **CLOSE)


@families
@stacks
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_real_token(family, stack, side):
    model, row = student(family, stack), ids_of(14, 1)
    pad = (6, 0) if side == "left" else (0, 6)
    ids = torch.nn.functional.pad(row, pad, value=11)
    mask = torch.nn.functional.pad(torch.ones_like(row), pad)
    real, want = mask[0].bool(), model(row).logits[0]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[0, real], want, **CLOSE)
    position = (mask.cumsum(-1) - 1).clamp_min(0)  # as `generate` passes them
    torch.testing.assert_close(model(ids, attention_mask=mask, position_ids=position).logits[0, real], want, **CLOSE)


@families
@torch.no_grad()
def test_embeddings_and_positions_can_be_given_in_place_of_ids(family):
    model, ids = student(family), ids_of(15)
    want = model(ids).logits
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, want)
    assert torch.equal(model(ids, position_ids=torch.arange(15)[None]).logits, want)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, want)


def test_signatures_are_those_that_generic_code_looks_for():
    names = list(inspect.signature(XLSTMHybridForCausalLM.forward).parameters)
    assert names[1:3] == ["input_ids", "attention_mask"]
    assert {"position_ids", CACHE, "inputs_embeds", "labels", "use_cache", "logits_to_keep"} <= set(names)
    model = small()
    assert model.model.config is model.config
    assert model.can_generate() and not model.model.can_generate() and model.get_decoder() is model.model
    assert model.base_model is model.model and model.get_input_embeddings() is model.model.embed_tokens
    assert model.supports_gradient_checkpointing and model.main_input_name == "input_ids"


# --- training ----------------------------------------------------------------------------------------------------


@families
@stacks
def test_every_parameter_learns_with_and_without_checkpointing(family, stack):
    model, ids = own(student(family, stack)).train(), ids_of(16)
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: x.grad.clone() for name, x in model.named_parameters()})
    assert all(float(g.abs().max()) > 0 for g in found[0].values())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-8, rtol=1e-5)


@families
def test_training_mode_is_deterministic_without_dropout_and_random_with_it(family):
    model, ids = own(student(family)).train(), ids_of(16)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.config.attention_dropout = 0.5
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_the_loss_is_the_mean_of_shifted_cross_entropy_or_the_sum_over_a_given_count():
    model, ids = small(), token_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    logits, wanted = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(out.loss, cross_entropy(logits.float(), wanted).to(out.loss.dtype), atol=1e-5, rtol=1e-5)
    total = cross_entropy(logits.float(), wanted, reduction="sum")
    for count in (7, torch.tensor(7)):
        torch.testing.assert_close(
            model(ids, labels=labels, num_items_in_batch=count).loss.float(), total / 7, atol=1e-5, rtol=1e-5
        )
    parts = [model(ids[j : j + 1], labels=labels[j : j + 1], num_items_in_batch=18).loss for j in (0, 1)]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels, num_items_in_batch=18).loss, atol=1e-5, rtol=1e-5)


@families
def test_a_student_learns_a_batch_by_heart(family):
    model, ids = own(student(family, dtype=torch.float32, gain=1.0)).train(), ids_of(16, rows=1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3 and losses[-1] < 0.3, losses


@torch.no_grad()
def test_generation_in_training_mode_under_checkpointing_is_generation():
    model, ids = own(small()), token_ids(2, 9)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **options)
    model.train().gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert torch.equal(model.generate(ids, **options), want)


def test_checkpointed_training_after_a_filled_cache_is_refused_by_name():
    model, ids = own(small()), token_ids(2, 9)
    with torch.no_grad():
        cache = cache_of(model(ids, cache=DynamicCache(config=model.config)))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(
        CacheError, match="cache holds 9 tokens, but layers work without a cache under gradient checkpointing"
    ):
        model(ids, cache=cache)
