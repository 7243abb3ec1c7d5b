"""Adapters of PEFT on a student: presets of targets, and a report of what trains.

    model = get_peft_model(student, lora_config(student, "projections"))
    print(coverage(model))

Projections and MLPs are `nn.Linear`: LoRA and DoRA take them as `target_modules`. Feature maps and gates are parameters
of the mixer, reached by `target_parameters`: LoRA only, peft has no DoRA and no dropout for them. `whole_mixer` trains copies of the
mixers at full rank instead (`modules_to_save`). Every path of the model calls its projections and its mixer as modules, so that an adapter acts in
all of them. A wrapped parameter is put together again in each call: merge (`merge_and_unload`) before long generation.

QLoRA: `from_pretrained(student, quantization_config=BitsAndBytesConfig(...))` quantises the linear layers only; maps
and gates are parameters and stay as they are, gates in float32. Then `prepare_model_for_kbit_training` and any preset. bitsandbytes does this on a
CPU (tried: 0.50, NF4 and 8 bit; an evaluation repacks 4-bit weights on a CPU, after which they no longer train) and is
meant for a GPU (not tried). TRL rounds what trains beside a quantised base to bfloat16, gates of `whole_mixer`
included: take "mixer" there. Merge into the student in full precision.
Dims: r rank, H query heads, K head dim, D hidden size.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from xlstm_hybrid.errors import AdapterError
from xlstm_hybrid.model.mixer import GATE_PARAMETERS

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# of layers of linear attention, beside those that have the names of attention's
LINEAR = (
    "a_proj",
    "b_proj",
    "g_proj",
    *(f"in_proj_{name}" for name in ("qkvz", "ba", "qkv", "z", "b", "a")),
    "out_proj",
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # of all experts of a layer, [E, 2 F, D] and [E, D, F]
MAPS, GATES = ("mlstm.q_map", "mlstm.k_map"), ("mlstm.igate_weight", "mlstm.fgate_weight", "mlstm.ogate_weight")
WHOLE = "mlstm"  # the mixer itself, as a name for `modules_to_save`
PRESETS = {
    "attention": ATTENTION,
    "mlp": MLP,
    "experts": EXPERTS,  # in no other preset: they are most of the model
    "linear_attention": LINEAR,
    "projections": ATTENTION + MLP + LINEAR,
    "feature_maps": MAPS,
    "gates": GATES,  # their biases are vectors, of no rank to lower: they stay frozen
    "mixer": MAPS + GATES,
    "all": ATTENTION + MLP + LINEAR + MAPS + GATES,
    "whole_mixer": (WHOLE,),
}
GROUP_OF = {"q_map": "feature maps", "k_map": "feature maps", "embed_tokens": "embeddings", "lm_head": "head"}
GROUP_OF |= dict.fromkeys(ATTENTION, "attention") | dict.fromkeys(MLP, "mlp")
GROUP_OF |= {"gate_up_proj": "mlp", "gate": "mlp", "shared_expert_gate": "mlp"}
GROUP_OF |= dict.fromkeys((*GATE_PARAMETERS, "norm_weight"), "gates")
TIED = ("embed_tokens", "lm_head")
WRAPPERS = (".base_layer", ".original_module")  # what peft puts into the names of what it wraps
# Arguments that peft ignores, or refuses late, where a parameter is the target, and their neutral values
PARAMETERS_ONLY = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"), None)
PARAMETERS_ONLY |= {"lora_bias": False, "fan_in_fan_out": False, "use_dora": False, "lora_dropout": 0.0}


# --- what to target ----------------------------------------------------------------------------------------------


def unwrapped_name(name):
    """A parameter's or module's name as it was before peft wrapped anything."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adaptable(model):
    """`{short name: number of tensors}` of what adapters can name in this model, in the order of the layers."""
    names, own = Counter(), own_parameters(model)
    for name, x in unwrapped(model).named_parameters():
        owner, leaf = unwrapped_name(name).split(".")[-2:]
        if id(x) in own or x.ndim < 2:
            continue
        if owner == WHOLE:
            names[f"{WHOLE}.{leaf}"] += 1
            names[WHOLE] += leaf == "q_map"
        elif owner == "experts":
            names[f"{owner}.{leaf}"] += 1
        elif leaf == "weight" and owner not in ("gate", "conv1d"):  # a router is no linear map to peft
            names[owner] += 1
    return dict(names)


def target_names(model, targets):
    """Short names for a preset, or for a list of presets and of names of one's own. Of a preset, what there is: a layer
    may have no mixer.

    Raises:
        AdapterError: an entry that is in no layer of this model, or an embedding or head that is tied.
    """
    exist, chosen = adaptable(model), {}
    for entry in [targets] if isinstance(targets, str) else list(targets):
        names = PRESETS.get(entry, (entry, f"{WHOLE}.{entry}"))
        if exist.keys().isdisjoint(names):
            raise AdapterError(
                f"{entry!r} matches nothing in this {type(unwrapped(model)).__name__}: presets are {sorted(PRESETS)}, names in it are "
                f"{sorted(exist)}"
            )
        chosen |= dict.fromkeys(name for name in names if name in exist)
    if not chosen:
        raise AdapterError(f"no targets: name at least one preset of {sorted(PRESETS)}")
    if WHOLE in chosen and any(name.startswith(f"{WHOLE}.") for name in chosen):
        raise AdapterError(
            "targets hold the whole mixer and parts of it: its copy is trained at full rank, leave the parts out"
        )
    if unwrapped(model).config.tie_word_embeddings and not chosen.keys().isdisjoint(TIED):
        raise AdapterError(
            f"{' and '.join(TIED)} are tied: merging an adapter of one would change the other; leave it out, or untie them"
        )
    return list(chosen)


def lora_config(model, targets="projections", *, r=16, lora_alpha=None, lora_dropout=0.0, use_dora=False, **kwargs):
    """peft's `LoraConfig` for this student, for `get_peft_model` or a TRL trainer's `peft_config`.

    Args:
        model: student; a PeftModel for a second adapter.
        targets: a name of PRESETS, or a list of presets and names of modules ("q_proj") or parameters ("mlstm.q_map")
            in the model.
        r: rank. A feature map [H, K, K] gets one adapter of rank r per head, 2 r K numbers beside K².
        lora_alpha: scale, of which the update gets lora_alpha / r; 2 r by default.
        use_dora: magnitudes beside directions; on linear layers only.
        kwargs: of `LoraConfig`.
    Raises:
        AdapterError: targets that match nothing here, or that do not go with the other arguments.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if named := sorted({"target_modules", "target_parameters"} & kwargs.keys()):
        raise AdapterError(f"{named[0]}: name modules and parameters in `targets`, which finds out what they are")
    names = target_names(model, targets)
    parameters = [name for name in names if "." in name]
    modules = [name for name in names if name not in (WHOLE, *parameters)]
    if not (isinstance(r, int) and r >= 1):
        raise AdapterError(f"r={r!r}: expected a rank of at least 1")
    arguments = {"use_dora": use_dora, "lora_dropout": lora_dropout, **kwargs}
    wrong = [name for name, x in PARAMETERS_ONLY.items() if arguments.get(name, x) not in (x, [], None)]
    if parameters and wrong:  # peft would say so late, or ignore them
        raise AdapterError(
            f"{wrong[0]}={arguments[wrong[0]]!r} does not work on {', '.join(parameters)}: peft adapts parameters by plain LoRA only; "
            "choose 'projections', or 'whole_mixer' for the mixers beside it"
        )
    saved = [name for name in names if name == WHOLE] + list(kwargs.pop("modules_to_save", None) or ())
    return LoraConfig(
        task_type=kwargs.pop("task_type", "CAUSAL_LM"),
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        # peft wants a target even where only copies train
        target_modules=modules if modules or parameters else DUMMY_TARGET_MODULES,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        **kwargs,
    )


# --- what is covered ---------------------------------------------------------------------------------------------


@dataclass
class Coverage:
    """What trains, per group of parameters; counts are numbers, not tensors.

    groups: {group: {"parameters": of the base model, split into "adapted" (an active adapter acts on them), "whole"
    (trained themselves, or an active copy of them) and "frozen"; "adapter": those of active adapters for the group;
    "trained": all that gets a gradient}}.
    """

    groups: dict = field(default_factory=dict)

    def as_dict(self):
        """The groups, and "total" over them."""
        keys = next(iter(self.groups.values()))
        return self.groups | {"total": {key: sum(group[key] for group in self.groups.values()) for key in keys}}

    def table(self):
        """A `rich.table.Table`."""
        from rich.table import Table

        rows = self.as_dict()
        columns, table = list(rows["total"]), Table("group")
        for column in columns:
            table.add_column(column, justify="right")
        for name, row in rows.items():
            cells = [f"{row[column]:,}" if row[column] else "–" for column in columns]
            table.add_row(name, *cells, end_section=name == list(rows)[-2])
        return table

    def __str__(self):
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def tuner_layers(model):
    """`(place, module, active adapters)` of all that peft has put into the model; place is the plain name of what it
    wraps.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in unwrapped(model).named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            parameter = vars(module).get("parameter_name")  # of a wrapper that adapts one parameter of a module
            place = unwrapped_name(name) if parameter is None else f"{unwrapped_name(name)}.{parameter}"
            yield place, module, () if module.disable_adapters else tuple(module.active_adapters)


def adapter_parameters(module):
    """`(adapter, name, parameter)` of all in a tuner layer; names count within the layer."""
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        entries = attrgetter(attribute)(module) if hasattr(module, attribute.split(".")[0]) else {}
        for adapter, x in entries.items() if hasattr(entries, "items") else ():
            if isinstance(x, nn.Module):
                yield from ((adapter, name, parameter) for name, parameter in x.named_parameters())
            elif isinstance(x, nn.Parameter):
                yield adapter, "", x


def own_parameters(model):
    """ids of the parameters that belong to adapters, not to the base model."""
    return {id(x) for _, module, _ in tuner_layers(model) for _, _, x in adapter_parameters(module)}


def numel(x):
    """Numbers in a parameter, also where bitsandbytes has packed two into a byte."""
    state = getattr(x, "quant_state", None)
    return x.numel() if state is None else state.shape.numel()


def parameter_group(name):
    """The group of a parameter by its plain name."""
    if ".linear_attn." in name:
        return "linear attention"
    named = [GROUP_OF[part] for part in name.split(".") if part in GROUP_OF]
    return named[-1] if named else "norms" if "norm" in name else "other"


def coverage(model):
    """What an adapted model trains; also for a model without adapters. Print it, or read `groups`.

    Raises:
        AdapterError: an adapter names a target that matches nothing in the model.
    """
    check_matches(model)
    # {id: (group, parameter)} of active adapters, ids of what they act on, ids of what active copies stand for
    adapters, adapted, copied = {}, set(), set()
    for place, module, active in tuner_layers(model):
        mine = [(f"{place}.{name}", x) for adapter, name, x in adapter_parameters(module) if adapter in active]
        if mine and hasattr(module, "original_module"):
            copied |= {id(x) for x in module.original_module.parameters()}
        elif mine:
            adapted.add(id(module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight))
        adapters |= {id(x): (parameter_group(name), x) for name, x in mine}
    base, own = {id(x): x for x in unwrapped(model).parameters()}, own_parameters(model)
    # soft prompts stand beside the model
    adapters |= {id(x): ("prompt", x) for x in model.parameters() if id(x) not in base}
    groups, kinds = {}, ("parameters", "adapted", "whole", "frozen", "adapter", "trained")

    def add(group, x, kind):
        row = groups.setdefault(group, dict.fromkeys(kinds, 0))
        row[kind] += numel(x)
        row["parameters"] += numel(x) * (kind != "adapter")
        row["trained"] += numel(x) * x.requires_grad

    for name, x in unwrapped(model).named_parameters():
        if id(x) not in own:
            whole = id(x) in copied or x.requires_grad
            kind = "adapted" if id(x) in adapted else "whole" if whole else "frozen"
            add(parameter_group(unwrapped_name(name)), x, kind)
    for group, x in adapters.values():
        add(group, x, "adapter")
    return Coverage(groups)


def check_matches(model):
    """Raise AdapterError if an adapter's config names something that it did not reach; peft itself speaks up only if
    nothing at all matches.
    """
    reached = {}
    for place, module, _ in tuner_layers(model):
        for adapter, _, _ in adapter_parameters(module):
            reached.setdefault(adapter, set()).add(place)
    for adapter, config in getattr(model, "peft_config", {}).items():
        for attribute in ("target_modules", "target_parameters", "modules_to_save"):
            entries = getattr(config, attribute, None) or ()
            for entry in () if isinstance(entries, str) else sorted(entries):
                if not any(place == entry or place.endswith(f".{entry}") for place in reached.get(adapter, ())):
                    raise AdapterError(
                        f"adapter {adapter!r}: {attribute} names {entry!r}, which matches nothing in this model; names in it are "
                        f"{sorted(adaptable(model))}"
                    )
