"""An adapter is the weight it merges to, in every path of the model; what trains is what was asked for; a target that
is not there is an error.
"""

import peft
import pytest
import torch
from conftest import tiny_student, token_ids
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from xlstm_hybrid.errors import AdapterError, CacheError
from xlstm_hybrid.model.adapters import (
    ATTENTION,
    GATES,
    MAPS,
    MLP,
    PRESETS,
    adaptable,
    coverage,
    lora_config,
    target_names,
)

LAYERS, D, F, H, G, K, R = 3, 48, 56, 4, 2, 16, 2  # of conftest's tiny student; R: rank in these tests
COUNTS = {  # numbers per group in the whole student
    "attention": LAYERS * (2 * D * H * K + 2 * D * G * K),
    "mlp": LAYERS * 3 * D * F,
    "feature maps": LAYERS * 2 * H * K * K,
    "gates": LAYERS * (2 * H * D + H * 3 * K),  # the matrices; biases are vectors
}
BIASES = {"attention": LAYERS * (H + 2 * G) * K, "gates": LAYERS * 2 * H}
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
MIXED = {"layer_types": ["hybrid_sliding", "full_attention", "full_attention"]}


def shake(model, seed=5, scale=0.2):
    """Random adapters: fresh ones are zero and would hide a path that ignores them. What starts from a weight of the
    model is moved away from it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(0.0 if "lora_A" in name or "lora_B" in name else 1.0)
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype),
                    alpha=scale,
                )
    return model


def adapted(targets="all", student=None, seed=5, adapter_name="default", **arguments):
    student = student or tiny_student(tie_word_embeddings=False)
    return shake(get_peft_model(student, lora_config(student, targets, r=R, **arguments), adapter_name), seed).eval()


def forward(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def prefill(model, ids):
    return model(input_ids=ids, use_cache=True).logits


def decode(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():  # as generation does: one token takes the step of its own
        return torch.cat(
            [model(input_ids=ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(ids.shape[1])], 1
        )


def teacher_forced(model, ids):
    out = model(input_ids=ids, teacher_forced=True)
    return torch.cat([out.error, out.target])


PATHS = {"forward": forward, "prefill": prefill, "decode": decode, "teacher forced": teacher_forced}


def grouped(model, key):
    return {name: row[key] for name, row in coverage(model).groups.items() if row[key]}


# --- one function, whoever asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*ATTENTION, *MLP, *MAPS, *GATES, "whole_mixer"])
def test_an_adapter_of_any_one_target_acts_in_every_path_as_the_weight_it_merges_to(target):
    model, ids = adapted([target]), token_ids(2, 12)
    with torch.no_grad():
        got = {name: path(model, ids) for name, path in PATHS.items()}
        with model.disable_adapter():
            bare = {name: path(model, ids) for name, path in PATHS.items()}
        merged = model.merge_and_unload()
        assert type(merged).__name__ == "XLSTMHybridForCausalLM" and not any(
            "lora" in name for name, _ in merged.named_parameters()
        )
        for name, path in PATHS.items():
            torch.testing.assert_close(
                got[name], path(merged, ids), **TIGHT, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert (got[name] - bare[name]).abs().max() > 1e-3 * bare[name].abs().max(), name
    torch.testing.assert_close(got["decode"], got["forward"], **TIGHT)


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "head", "tie_word_embeddings": True}, {"norm_position": "post", "qk_norm": "full"}, MIXED]
)
@torch.no_grad()
def test_all_targets_together_merge_in_every_kind_of_stack(changes):
    ids = token_ids(2, 23)
    model = adapted("all", tiny_student(**changes))
    got = forward(model, ids)
    assert got.std() > 1
    torch.testing.assert_close(decode(model, ids), got, **TIGHT)
    torch.testing.assert_close(forward(model.merge_and_unload(safe_merge=True), ids), got, **TIGHT)


@torch.no_grad()
def test_dora_on_projections_is_the_weight_it_merges_to():
    ids = token_ids(2, 12)
    model, bare = adapted("projections", use_dora=True), forward(tiny_student(), ids)
    assert any("magnitude" in name for name, _ in model.named_parameters())
    got = forward(model, ids)
    torch.testing.assert_close(decode(model, ids), got, **TIGHT)
    assert (got - bare).abs().max() > 0.1
    torch.testing.assert_close(forward(model.merge_and_unload(), ids), got, **TIGHT)


@torch.no_grad()
def test_without_its_adapter_the_model_is_its_base_bit_for_bit():
    base, ids = tiny_student(), token_ids(2, 12)
    weights = {name: x.clone() for name, x in base.state_dict().items()}
    want = {name: path(base, ids) for name, path in PATHS.items()}
    model = adapted(["all"], base)
    with model.disable_adapter():
        for name, path in PATHS.items():
            assert torch.equal(path(model, ids), want[name]), name
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in unloaded.state_dict().items())


@torch.no_grad()
def test_an_adapted_student_generates_through_its_cache_what_the_merged_one_generates():
    model = adapted("all")
    ids = token_ids(2, 9)
    arguments = {
        "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9]),
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
    }
    got = model.generate(input_ids=ids, **arguments)
    assert got.shape == (2, 29)
    assert torch.equal(got, model.generate(input_ids=ids, use_cache=False, **arguments))
    with model.disable_adapter():
        assert not torch.equal(got, model.generate(input_ids=ids, **arguments))
    assert torch.equal(got, model.merge_and_unload().generate(input_ids=ids, **arguments))


@pytest.mark.parametrize("targets", ["projections", "all", "whole_mixer"])
@torch.no_grad()
def test_adapters_are_saved_alone_and_found_again_by_every_loader(tmp_path, targets):
    ids, bare = token_ids(2, 12), tiny_student(torch.float32)
    bare.save_pretrained(tmp_path / "student")
    model = adapted(targets, AutoModelForCausalLM.from_pretrained(tmp_path / "student"))
    model.save_pretrained(tmp_path / "adapter")
    saved = peft.load_peft_weights(str(tmp_path / "adapter"))
    assert sum(x.numel() for x in saved.values()) == coverage(model).as_dict()["total"]["adapter"]
    want = forward(model, ids)
    assert (want - forward(bare, ids)).abs().max() > 0.1
    with_adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with_adapter.load_adapter(str(tmp_path / "adapter"))
    loaders = (
        PeftModel.from_pretrained(bare, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    )
    for loaded in (*loaders, AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), with_adapter):
        assert torch.equal(forward(loaded.eval(), ids), want)


@torch.no_grad()
def test_of_several_adapters_the_chosen_one_acts():
    ids = token_ids(2, 12)
    alone = {name: forward(adapted("all", seed=seed), ids) for name, seed in (("first", 1), ("second", 2))}
    model = adapted("all", seed=1, adapter_name="first")
    model.add_adapter("second", lora_config(model, "all", r=R))
    model.set_adapter("second")
    shake(model, seed=2)
    for name in ("second", "first"):
        model.set_adapter(name)
        torch.testing.assert_close(forward(model, ids), alone[name], **TIGHT)
        torch.testing.assert_close(decode(model, ids), alone[name], **TIGHT)
    assert coverage(model).as_dict()["total"]["trained"] == coverage(adapted("all")).as_dict()["total"]["trained"]


# --- what trains -------------------------------------------------------------------------------------------------


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("targets", ["all", "whole_mixer", ["projections", "whole_mixer"]])
def test_one_step_moves_every_adapter_and_nothing_else(targets):
    model, ids = adapted(targets).train(), token_ids(2, 12)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss_of(model, ids).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "lora_" in name or ".modules_to_save." in name}
    assert moved == {name for name, x in model.named_parameters() if x.requires_grad}


def test_checkpointed_activations_give_the_same_gradients():
    ids = token_ids(2, 12)

    def gradients(checkpointing):
        model = adapted(["all"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        loss_of(model, ids).backward()
        return {name: x.grad for name, x in model.named_parameters() if x.requires_grad}

    want, got = gradients(False), gradients(True)
    assert len(want) > 60 and all(x.abs().max() > 0 for x in want.values())
    torch.testing.assert_close(got, want, **TIGHT)


def test_the_gradient_of_an_adapted_map_is_that_of_the_map_through_the_factors():
    """dL/dB of W + s B A is s dL/dW A', here by the full gradient of the merged student."""
    ids, model = token_ids(2, 12), adapted(MAPS)
    loss_of(model, ids).backward()
    wrappers = {
        module.parameter_name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] in ("mlstm", "base_layer") and ".layers.1." in name and hasattr(module, "parameter_name")
    }
    factors = {
        name: (w.lora_A["default"].weight, w.lora_B["default"].weight, w.scaling["default"])
        for name, w in wrappers.items()
    }
    merged = model.merge_and_unload().requires_grad_(True)
    loss_of(merged, ids).backward()
    for name, (a, b, scale) in factors.items():
        whole = getattr(merged.model.layers[1].self_attn.mlstm, name).grad  # [H, K, K]
        # per head [R, K], [K, R]
        a_heads, b_heads = a.detach().view(H, R, K), b.detach().view(K, R, H).permute(2, 0, 1)
        torch.testing.assert_close(a.grad.view(H, R, K), scale * b_heads.mT @ whole, **TIGHT)
        torch.testing.assert_close(b.grad.view(K, R, H).permute(2, 0, 1), scale * whole @ a_heads.mT, **TIGHT)


# --- presets and the report --------------------------------------------------------------------------------------


BOTH, MIXER = ["attention", "mlp"], ["feature maps", "gates"]
GROUPS = {
    "attention": ["attention"],
    "mlp": ["mlp"],
    "projections": BOTH,
    "feature_maps": ["feature maps"],
    "gates": ["gates"],
    "mixer": MIXER,
}
GROUPS["all"] = BOTH + MIXER


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name not in ("experts", "linear_attention", "whole_mixer")]
)
def test_a_preset_adapts_all_of_its_groups_and_no_other(preset):
    model = adapted(preset)
    assert grouped(model, "adapted") == {name: COUNTS[name] for name in GROUPS[preset]}
    assert set(grouped(model, "trained")) == set(grouped(model, "adapter")) == set(GROUPS[preset])
    total, base = coverage(model).as_dict()["total"], sum(x.numel() for x in tiny_student().parameters())
    assert total["parameters"] == base == total["adapted"] + total["whole"] + total["frozen"]
    assert total["trained"] == model.get_nb_trainable_parameters()[0]


def test_rank_counts_per_head_of_a_map_and_whole_mixers_train_their_biases_too():
    assert grouped(adapted("feature_maps"), "trained") == {"feature maps": LAYERS * 2 * H * R * 2 * K}
    assert grouped(adapted("gates"), "trained") == {"gates": LAYERS * R * (2 * (H + D) + H + 3 * K)}
    whole = {"feature maps": COUNTS["feature maps"], "gates": COUNTS["gates"] + BIASES["gates"]}
    model = adapted("whole_mixer")
    assert grouped(model, "trained") == grouped(model, "whole") == whole and not grouped(model, "adapted")


def test_the_report_reads_as_a_table_and_as_a_dict():
    report = coverage(adapted("projections"))
    lines = str(report).splitlines()
    # two borders, the header, two rules, the total
    assert len(lines) == len(report.groups) + 6 and "total" in lines[-2]
    for name, row in report.as_dict().items():
        line = next(line for line in lines if f"│ {name} " in line)
        assert all(f"{n:,}" in line for n in row.values() if n)
    bare = coverage(tiny_student()).as_dict()["total"]
    assert bare["whole"] == bare["trained"] == bare["parameters"] and not bare["adapted"]


def test_presets_reach_the_hybrid_layers_of_a_mixed_student():
    model = adapted("all", tiny_student(**MIXED))
    assert grouped(model, "adapted")["feature maps"] == COUNTS["feature maps"] // LAYERS
    assert grouped(model, "adapted")["attention"] == COUNTS["attention"]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "arguments", "message"),
    [
        ("mixers", {}, r"'mixers' matches nothing.*presets are \['all', 'attention'.*names in it are .*'mlstm.q_map'"),
        (["attention", "qkv_proj"], {}, "'qkv_proj' matches nothing.*'q_proj'"),
        (["mlstm.ogate_bias"], {}, "'mlstm.ogate_bias' matches nothing"),
        ([], {}, "no targets"),
        ("projections", {"r": 0}, "r=0: expected a rank of at least 1"),
        ("mixer", {"use_dora": True}, "use_dora=True does not work on mlstm.q_map, .*'whole_mixer'"),
        ("all", {"lora_dropout": 0.1}, "lora_dropout=0.1 does not work on mlstm.q_map"),
        ("all", {"layers_to_transform": [0]}, r"layers_to_transform=\[0\] does not work on"),
        ("feature_maps", {"exclude_modules": ["mlstm"]}, "exclude_modules=.* does not work on"),
        (["whole_mixer", "gates"], {}, "the whole mixer and parts of it"),
        ("all", {"target_modules": ["q_proj"]}, "target_modules: name modules and parameters in `targets`"),
    ],
)
def test_targets_that_match_nothing_or_cannot_be_adapted_are_refused(targets, arguments, message):
    with pytest.raises(AdapterError, match=message):
        lora_config(tiny_student(), targets, **arguments)


def test_a_tied_head_and_a_student_without_hybrid_layers_are_refused_by_name():
    with pytest.raises(AdapterError, match="embed_tokens and lm_head are tied"):
        lora_config(tiny_student(tie_word_embeddings=True), ["embed_tokens"])
    plain = tiny_student(layer_types=["full_attention"] * LAYERS)
    assert not any("mlstm" in name for name in adaptable(plain))
    for preset in ("mixer", "whole_mixer"):
        with pytest.raises(AdapterError, match=f"'{preset}' matches nothing"):
            lora_config(plain, preset)


@pytest.mark.parametrize(
    "wrong",
    [{"target_parameters": ["mlstm.q_maps"]}, {"target_modules": ["q_proj", "qq_proj"]}, {"modules_to_save": ["mlst"]}],
)
@pytest.mark.filterwarnings("ignore:target_parameters")
def test_a_target_of_ones_own_that_matches_nothing_is_an_error_of_the_report(wrong):
    """peft itself says nothing as long as something matches."""
    model = get_peft_model(tiny_student(), LoraConfig(**{"target_modules": ["q_proj"], "r": R, **wrong}))
    name = next(iter(wrong.values()))[-1]
    with pytest.raises(
        AdapterError, match=f"adapter 'default': {next(iter(wrong))} names '{name}', which matches nothing"
    ):
        coverage(model)


def test_prefix_tuning_has_no_state_to_give_and_is_refused_where_a_soft_prompt_works():
    ids = token_ids(2, 9)
    arguments = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prompted = get_peft_model(tiny_student(), PromptTuningConfig(**arguments))
    soft = prompted.get_prompt(batch_size=2).to(torch.float64)
    want = prompted.get_base_model()(inputs_embeds=torch.cat([soft, prompted.get_input_embeddings()(ids)], 1)).logits
    torch.testing.assert_close(prompted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, want, **TIGHT)
    assert coverage(prompted).as_dict()["total"]["trained"] == grouped(prompted, "adapter")["prompt"] == 3 * D
    prefixed = get_peft_model(tiny_student(torch.float32), PrefixTuningConfig(**arguments))
    with pytest.raises(CacheError, match="filled DynamicLayer.* prefix tuning, which has no state"):
        prefixed(input_ids=ids, attention_mask=torch.ones_like(ids))


# --- precision and registration ----------------------------------------------------------------------------------


def test_gates_stay_in_float32_beside_half_precision_weights(tmp_path):
    tiny_student(torch.float32).save_pretrained(tmp_path)

    def kinds(model):
        return {str(x.dtype) for name, x in model.named_parameters() if "gate_weight" in name or "gate_bias" in name}

    student = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert student.lm_head.weight.dtype == torch.bfloat16 and kinds(student) == {"torch.float32"}
    model = adapted("all", student)
    assert {x.dtype for x in model.parameters() if x.requires_grad} == {torch.float32}
    ids = token_ids(2, 12)
    with torch.no_grad():
        got = forward(model, ids)
        merged = model.merge_and_unload()
        assert kinds(merged) == {"torch.float32"} and merged.lm_head.weight.dtype == torch.bfloat16
        assert torch.isfinite(got).all() and got.dtype == torch.bfloat16
    prepared = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert kinds(prepared) == {"torch.float32"} and not any(x.requires_grad for x in prepared.parameters())
    trained = get_peft_model(prepared, lora_config(prepared, "all", r=R))
    loss_of(shake(trained), ids).backward()
    assert all(x.grad.abs().max() > 0 for x in trained.parameters() if x.requires_grad)


@pytest.mark.parametrize("targets", ["all", "whole_mixer"])
def test_adapters_train_beside_four_bit_projections_and_merge_into_the_student(tmp_path, targets):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes wants blocks of 64
    bare = tiny_student(torch.float32, gain=1.0, hidden_size=64, intermediate_size=128)
    bare.save_pretrained(tmp_path / "student")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", quantization_config=four_bits, dtype=torch.bfloat16, device_map="cpu"
    )
    kinds = {name: x.dtype for name, x in quantised.named_parameters()}
    assert all((kind == torch.uint8) == name.endswith(("proj.weight",)) for name, kind in kinds.items())
    assert all(kind == torch.float32 for name, kind in kinds.items() if "gate_weight" in name or "gate_bias" in name)
    model, ids = (
        prepare_model_for_kbit_training(quantised, gradient_checkpointing_kwargs={"use_reentrant": False}),
        token_ids(4, 20),
    )
    model = get_peft_model(model, lora_config(model, targets, r=R)).train()
    assert coverage(model).as_dict()["total"]["parameters"] == sum(x.numel() for x in bare.parameters())
    optimizer, losses = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2), []
    for _ in range(8):
        losses.append(loss_of(model, ids))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        before = loss_of(bare, ids)
        merged = PeftModel.from_pretrained(bare, tmp_path / "adapter").merge_and_unload()
        assert loss_of(merged, ids) < before - 0.2


def test_peft_is_told_what_to_adapt_by_lora_config_alone():
    """peft has no default targets for a model type that is not transformers' own, and says so; nothing is put into its
    tables.
    """
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(tiny_student(), LoraConfig(r=R))


def test_an_adapter_that_transformers_adds_is_the_one_that_peft_adds():
    pytest.importorskip("peft", minversion="0.22")  # transformers asks for it
    model, direct = adapted(["q_proj", "v_proj"]), tiny_student(tie_word_embeddings=False)
    direct.add_adapter(lora_config(direct, ["q_proj", "v_proj"], r=R))
    assert coverage(direct).as_dict() == coverage(model).as_dict()


@torch.no_grad()
def test_experts_are_adapted_by_rank_for_each_and_merge():
    made = lambda: tiny_student(  # noqa: E731
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False
    )
    model, ids = adapted("experts", made()), token_ids(2, 12)
    assert coverage(model).groups["mlp"]["adapter"] == LAYERS * 4 * R * (D + 2 * 24 + 24 + D)
    want = forward(model, ids)
    assert float((want - forward(made(), ids)).std()) > 0.01
    torch.testing.assert_close(forward(model.merge_and_unload(), ids), want, **TIGHT)
    assert target_names(made(), "projections") == list(ATTENTION)
    with pytest.raises(AdapterError, match="'gate' matches nothing"):
        target_names(made(), "gate")
