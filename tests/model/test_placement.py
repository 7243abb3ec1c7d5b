"""A student spread over devices, files, processes, or stored in eight bits, is still the same function; what cannot be
shared out is refused.

The processes of the parallel tests run this file as a program, under torchrun with gloo.
"""

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_student, token_ids
from tiny_students import STACKS, every_family, ids_of, left_padded, student
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.state import load_state, prefill, save_state

ROOT = Path(__file__).parents[2]
families = pytest.mark.parametrize("family", every_family)
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
WAYS = {"logits", "greedy", "static", "beams", "chunks", "conversation"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# --- devices and offloading --------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_layers_on_disk_give_the_same_logits_and_tokens(family, tmp_path):
    pytest.importorskip("accelerate")
    model, (ids, mask) = student(family), left_padded([ids_of(11, 1), ids_of(6, 1, 4)])
    model.save_pretrained(tmp_path / "student", max_shard_size="60KB")
    rest, layer = ("disk", "disk") if every_family.index(family) % 2 else ("cpu", "disk")
    placed = {
        "model.embed_tokens": "cpu",
        "model.norm": rest,
        "model.rotary_emb": "cpu",
        "lm_head": "cpu" if model.config.tie_word_embeddings else rest,
    }
    placed |= {f"model.layers.{j}": layer if j else rest for j in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype="auto", device_map=placed, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[1].self_attn.mlstm.q_map.is_meta and spread.model.layers[2].mlp.up_proj.weight.is_meta
    found, want = spread(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    # no bits: weights lie otherwise in memory, mapped from a file
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)
    assert torch.equal(
        spread.generate(ids, attention_mask=mask, **GREEDY), model.generate(ids, attention_mask=mask, **GREEDY)
    )


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("changes", [{}, {"mixer_branches": "window"}], ids=str)
@torch.no_grad()
def test_the_norm_of_a_mix_is_fetched_as_the_other_parameters_are(place, changes, tmp_path):
    pytest.importorskip("accelerate")
    model, ids = tiny_student(mixer_norm=True, **changes), token_ids(2, 19)
    model.save_pretrained(tmp_path / "student")
    placed = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placed |= {f"model.layers.{j}": "disk" if place == "disk" or j else "cpu" for j in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype="auto", device_map=placed, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[2].self_attn.mlstm.norm_weight.is_meta
    torch.testing.assert_close(spread(ids).logits, model(ids).logits, atol=1e-9, rtol=1e-9)
    assert torch.equal(spread.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert spread.model.layers[2].self_attn.mlstm.norm_weight.is_meta  # and put back


def test_an_automatic_device_map_splits_no_layer():
    accelerate = pytest.importorskip("accelerate")
    made = student("llama")  # kept for other tests: not to be made on the meta device
    with torch.device("meta"):
        model = copy.deepcopy(made)
    layer = sum(x.numel() * x.element_size() for x in model.model.layers[0].parameters())
    for room in (1.2, 1.9, 2.5):
        budget = {0: int(room * layer), 1: int(room * layer), "cpu": 10**9}
        placed = accelerate.infer_auto_device_map(
            model, max_memory=budget, no_split_module_classes=model._no_split_modules
        )
        inside = [name for name in placed if name.count(".") > 2]
        assert not inside and len(set(placed.values())) > 1


def test_what_layers_share_can_be_sent_to_another_device():
    from accelerate.utils import send_to_device

    tokens = Tokens.locate((2, 5), torch.device("cpu"))
    sent = send_to_device({"tokens": tokens, "masks": {("hybrid_sliding", 7, 2): None}}, torch.device("meta"))
    assert (
        sent["tokens"].index.is_meta
        and sent["tokens"].real.is_meta
        and sent["tokens"].plain
        and not tokens.index.is_meta
    )
    assert student("llama")._skip_keys_device_placement == {"cache", "past_key_values"}


# --- quantisation ------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("stack", STACKS)
def test_quantisers_find_the_teachers_projections_and_nothing_of_ours(family, stack):
    """By transformers' own helper, which decides for bitsandbytes, torchao and the others; with and without a list of
    the user's.

    They replace linear layers, or the weights of linear layers, whose names match nothing of the list: the mixer is in
    it and has none.
    """
    model = student(family, stack)
    for chosen in (None, ["lm_head"]):
        skipped = HfQuantizer.get_modules_to_not_convert(model, chosen, model._keep_in_fp32_modules)
        converted = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and should_convert_module(name, skipped)
        }
        assert {name.rpartition(".")[2] for name in converted} == PROJECTIONS and len(converted) == 7 * 3
        ours = [name for name, _ in model.named_modules() if "mlstm" in name]
        assert ours and not [name for name in ours if should_convert_module(name, skipped)]


def quantisation(name):
    """The configuration of one quantiser; the test is skipped where its library is missing."""
    library = name.split()[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(**{f"load_in_{name.split()[1]}bit": True})


def with_weights_of(model, quantised):
    """A copy of the model with what the quantised projections compute: their weights row by row."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            bias = 0.0 if module.bias is None else module.bias.float()
            rows = torch.cat(
                [
                    quantised.get_submodule(name)(x)
                    for x in torch.eye(module.in_features, dtype=quantised.dtype).split(1)
                ]
            )
            module.weight.copy_((rows.float() - bias).T)
    return model


@pytest.mark.parametrize("name", ["torchao 8", "bitsandbytes 8", "bitsandbytes 4"])
@torch.no_grad()
def test_quantised_weights_leave_gates_maps_and_states_in_full_precision(name, tmp_path):
    config, ids = quantisation(name), token_ids(2, 20)
    # widths that 4-bit blocks fill
    model = tiny_student(torch.float32, gain=1.5, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    model.save_pretrained(tmp_path / "student")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16, quantization_config=config)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    for key, x in small.named_parameters():
        plain = x.dtype.is_floating_point and type(x.data) is torch.Tensor
        assert plain != (key.split(".")[-2] in PROJECTIONS and key.endswith("weight")), key
        if "mlstm" in key:
            assert torch.equal(x, half.get_parameter(key)) and x.dtype == half.get_parameter(key).dtype
    out = small(ids, use_cache=True)
    assert {x.dtype for layer in cache_of(out).layers for x in layer.state} == {torch.float32}
    wide = with_weights_of(model, small)(ids).logits
    assert float((out.logits.float() - wide).std() / wide.std()) < 0.1
    assert torch.equal(small.generate(ids, **GREEDY), small.generate(ids, cache_implementation="static", **GREEDY))


# --- parallel plans ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("stack", STACKS)
def test_plans_name_modules_that_exist_and_styles_that_are_known(family, stack):
    model = student(family, stack)
    names = {n.replace(f".{j}.", ".*.") for j in range(3) for n, _ in model.named_modules() if f".{j}." in n} | {
        n for n, _ in model.named_modules()
    }
    plan = model.tp_plan
    assert set(plan) <= names and model.supports_tp_plan and model.supports_pp_plan
    model.tp_plan = dict(plan)  # transformers checks the styles
    assert {name.rpartition(".")[2] for name in plan if "layers" in name} >= PROJECTIONS
    assert ("model.layers.*.self_attn.mlstm" in plan) == (model.config.qk_norm != "full")
    assert set(model.pp_plan) == {"model.embed_tokens", "model.layers", "model.norm", "lm_head"}


def launch(tmp_path, mode, *names, processes=2):
    """What the processes of `worker` found, from rank 0; None and the output where they failed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        __file__,
        mode,
        str(tmp_path),
        *names,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}:{ROOT / 'tests'}",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    found = tmp_path / "found.json"
    return json.loads(found.read_text()) if found.exists() and result.returncode == 0 else None, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_two_processes_are_one(mode, tmp_path):
    """Logits, gradients (tensor parallel), padded greedy, chunked and beam generation of every family, against one
    process on the same weights.
    """
    models = {family: student(family) for family in every_family} | {"mixed": student("llama", "mixed")}
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    models["gated"] = tiny_student(vocab_size=101, attention_output_gate=True, **no_tokens)  # W_q holds gates, too
    models["experts"] = student("qwen2_moe")  # whole in each process
    if mode == "pipeline":
        models["linear"] = student("olmo_hybrid")
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    found, log = launch(tmp_path, mode, *models)
    assert found is not None, log[-4000:]
    assert found.keys() == models.keys()
    for family, differences in found.items():
        assert differences.keys() >= WAYS | ({"gradients", "saved"} if mode == "tensor" else set())
        assert all(x <= 1e-5 for x in differences.values()), (family, differences)


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused_by_name(tmp_path):
    tiny_student().save_pretrained(tmp_path / "odd")  # 4 query and 2 key/value heads: not for three processes
    student("olmo_hybrid").save_pretrained(tmp_path / "linear")
    for name, message in (
        ("odd", "4 query and 2 key/value heads cannot be shared out to tp_size=3 processes"),
        ("linear", "layers of linear attention with tp_size=3: they are not shared out"),
    ):
        found, log = launch(tmp_path, "refusals", name, processes=3)
        assert found is not None, log[-4000:]
        assert message in found["heads"]


def test_states_and_alignment_of_a_part_of_a_model_are_refused_by_name(tmp_path):
    model, ids = copy.deepcopy(student("llama")), ids_of(9)
    cache = prefill(model, ids)
    save_state(cache, tmp_path / "a.safetensors", model)
    model._tp_size = 2
    for call in (
        lambda: save_state(cache, tmp_path / "b.safetensors", model),
        lambda: load_state(tmp_path / "a.safetensors", model),
    ):
        with pytest.raises(CacheError, match="safetensors: the model is shared out to several processes"):
            call()
    with pytest.raises(ConfigError, match="tp_size=2, expected 1"):
        model(ids, teacher_forced=True)
    assert not (tmp_path / "b.safetensors").exists()


# --- the program of one process ----------------------------------------------------------------------------------


def largest(a, b):
    return float((a.detach() - b.detach()).abs().max())


def gradients(model, ids, gather=lambda g: g):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: gather(x.grad) for name, x in model.named_parameters()}


def whole(g):
    return g.full_tensor() if hasattr(g, "full_tensor") else g


def compare(mode, directory, name):
    """Largest differences of one checkpoint, shared out and whole; 1 stands for tokens that differ."""
    sharing = {"tp_plan": "auto"} if mode == "tensor" else {"pp_size": 2}
    shared = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float64, distributed_config=sharing)
    alone = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float64)
    (ids, mask), found = left_padded([ids_of(11, 1), ids_of(6, 1, 4)]), {}
    padded, heads = {"attention_mask": mask, **GREEDY}, alone.config.num_attention_heads
    if mode == "tensor" and alone.config.qk_norm != "full":
        assert all(x.to_local().shape[0] == heads // 2 for key, x in shared.named_parameters() if ".mlstm." in key)
        # each process keeps the state of its own heads
        assert cache_of(shared(ids)).layers[0].state.C.shape[1] == heads // 2
    if mode == "pipeline":
        assert sum(isinstance(layer, nn.Identity) for layer in shared.model.layers) in (1, 2)
    with torch.no_grad():
        found["logits"] = largest(
            shared(ids, attention_mask=mask).logits[mask.bool()], alone(ids, attention_mask=mask).logits[mask.bool()]
        )
        ways = {"greedy": {}, "static": {"cache_implementation": "static"}}
        ways |= {"beams": {"num_beams": 2}, "chunks": {"prefill_chunk_size": 4}}
        for way, options in ways.items():
            found[way] = float(
                not torch.equal(shared.generate(ids, **padded, **options), alone.generate(ids, **padded, **options))
            )
        one, two = (model.generate(ids, return_dict_in_generate=True, **padded) for model in (alone, shared))
        longer = torch.cat([one.sequences, ids_of(4, seed=6)], 1)
        if alone.config.layer_types[0] in ("hybrid_sliding", "linear_attention"):
            again = shared.generate(longer, cache=cache_of(two), attention_mask=F.pad(mask, (0, 16), value=1), **GREEDY)
            want = alone.generate(longer, cache=cache_of(one), attention_mask=F.pad(mask, (0, 16), value=1), **GREEDY)
            found["conversation"] = float(not torch.equal(again, want))
    if mode == "tensor":
        one, two = gradients(alone, ids), gradients(shared, ids, whole)
        found["gradients"] = max(largest(two[key], one[key]) / (1e-3 + float(one[key].abs().max())) for key in one)
        shared.save_pretrained(directory / f"{name}-again")
        torch.distributed.barrier()
        again = AutoModelForCausalLM.from_pretrained(directory / f"{name}-again", dtype=torch.float64)
        found["saved"] = max(largest(again.state_dict()[key], x) for key, x in alone.state_dict().items())
    return found


def worker(mode, directory, names):
    torch.set_num_threads(1)
    if mode == "refusals":
        try:
            AutoModelForCausalLM.from_pretrained(
                directory / names[0], dtype=torch.float64, distributed_config={"tp_plan": "auto"}
            )
            found = {"heads": "nothing was refused"}
        except ConfigError as error:
            found = {"heads": str(error)}
    else:
        found = {name: compare(mode, directory, name) for name in names}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (directory / "found.json").write_text(json.dumps(found))
    with contextlib.suppress(RuntimeError):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
