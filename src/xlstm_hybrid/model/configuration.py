"""Configuration of the hybrid xLSTM student: the teacher's shape, and what each layer's mixer is."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.cache_names import NAMES

LINEAR = "linear_attention"
ATTENTION = ("full_attention", "sliding_attention")
TEACHER_LAYER_TYPES = (*ATTENTION, LINEAR)
LAYER_TYPES = ("hybrid_sliding", *TEACHER_LAYER_TYPES)
# whose linear attention it is -> its module in transformers
LINEAR_ATTENTION = {
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
}
LINEAR_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
# fields with an entry per layer
PER_LAYER = ("layer_types", "teacher_layer_types", "layer_windows", "layer_sinks", "kept_groups", "rope_layers")
COMBINATIONS, GATE_INPUTS = ("gate", "joint"), ("qkv", "x")
BRANCHES, CELLS = ("both", "memory", "window"), ("mlstm", "linear", "delta")
STEADY_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the whole text
FEATURE_MAPS = ("softmax", "softmax_signed", "silu")
MIXER = {  # fields of the mixer and of exact memories, and what they were before there was a choice
    "mixer_branches": "both",
    "window_dropout": 0.0,
    "memory_cell": "mlstm",
    "memory_rope": True,
    "memory_feature_map": "softmax",
    "memory_feature_dim": None,
    "mixer_norm": False,
    "mixer_combine": "gate",
    "mixer_gate_input": "qkv",
    "kept_groups": None,
    "kept_positions": "rope",
    "kept_log_base": 500,
    "sparse_memory": 0,
    "sparse_memory_score": "residual",
}
TRAITS = {  # what some teachers have beyond a Llama, and what a Llama has
    "rope_layers": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
    "norm_plus_one": False,
    "attention_output_gate": False,
    "num_experts": None,
    "num_experts_per_tok": None,
    "norm_topk_prob": False,
    "moe_intermediate_size": None,
    "shared_expert_intermediate_size": None,
    "mlp_only_layers": None,
    "linear_attention": None,
    **dict.fromkeys(LINEAR_SIZES),
    "linear_allow_neg_eigval": False,
}
# what the checks of mixer and exact memories read
CHOICES = (*MIXER, "num_key_value_heads", "layer_types", "teacher_layer_types")
# Fields in which a model and what it wrote, weights or states, may differ: no result depends on them but by rounding
INDIFFERENT = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("mlstm_chunk_size", "mlstm_output_gate_bias", "mlstm_context", "attention_dropout", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "window_dropout"),
    *("teacher_model_type", "freeze_embeddings", "output_router_logits", "router_aux_loss_coef"),
}
SCORES = ("residual", "weighted", "recency", "random")


class StudentConfig(PreTrainedConfig):
    """What the configurations of our students share."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; a config.json of another model type is a ConfigError: the weights beside it are none of
        this class, though most of them have the same names.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ConfigError(
                f"config.json: model_type is {kind!r}, expected {cls.model_type!r}: from_pretrained loads students. To make "
                "one of a teacher, call the class's from_teacher(TEACHER), or `xlstm-hybrid convert TEACHER OUT`; to load "
                "the teacher itself, AutoModelForCausalLM.from_pretrained"
            )
        return super().from_dict(config_dict, **kwargs)


@strict
class XLSTMHybridConfig(StudentConfig):
    """The teacher's fields under the teacher's names, then ours.

    Args:
        qk_norm: None; "head" (one RMS norm per head, Qwen3); "full" (over all heads at once, OLMo 2 and 3).
        norm_position: "pre" (Llama, Mistral, Qwen), "post" (OLMo 2 and 3: the norm follows attention and MLP) or "both"
            (Gemma 3).
        attention_bias: biases of q, k and v; `attention_output_bias` is that of o.
        rope_parameters: the teacher's dict, flat, or one dict per type in `teacher_layer_types`. With
            `partial_rotary_factor` only that part of each head rotates, its first dims (Qwen3-Next).
        rope_layers: per layer whether the teacher rotates queries and keys (SmolLM3: not all do); None: every layer.
        embedding_multiplier, residual_multiplier: factors of the embeddings, and of what attention and MLP add to the
            residual stream (Granite).
        attention_multiplier: factor of the products of queries and keys; None: head_dim^-0.5.
        logits_scaling, final_logit_softcapping: divisor of the logits, and c of c tanh(logits / c) (Gemma); TRL reads them
            under these names as well.
        norm_plus_one: whether norms multiply by 1 + weight (Gemma 3, Qwen3-Next).
        attention_output_gate: whether the output of attention, before W_o, is multiplied by the sigmoid of a gate, which
            W_q gives beside each head's query (Qwen3-Next, Qwen3.5). In a hybrid layer it multiplies the mix.
        num_experts, num_experts_per_tok: experts of a layer's MLP, and how many of them a token goes through; None: one MLP
            for all tokens.
        norm_topk_prob: whether the chosen experts' weights sum to 1.
        moe_intermediate_size, shared_expert_intermediate_size: width of an expert, and of the one that all tokens go
            through beside (Qwen2-MoE; None: there is none).
        mlp_only_layers: numbers of the layers without experts.
        linear_attention: whose module the "linear_attention" layers have, a key of `LINEAR_ATTENTION`; linear_num_key_heads
            and the other `LINEAR_SIZES` are its sizes, linear_allow_neg_eigval whether its memory may be corrected twice
            over (OLMo-Hybrid).
        output_router_logits, router_aux_loss_coef: whether a forward returns the loss that balances experts, and its
            weight, as in transformers; our trainers ask for it where routers learn.
        layer_types: per layer "hybrid_sliding" (window + sinks beside an mLSTM; the default), "full_attention" or
            "sliding_attention"; "linear_attention" where the teacher's is, and nowhere else.
        teacher_layer_types: what each layer was in the teacher. Decides the layer's RoPE and its alignment target.
        teacher_sliding_window: window of the teacher's own "sliding_attention" layers.
        sliding_window: window W of the hybrid layers, in tokens, the present one included.
        num_sink_tokens: first real tokens of a document that stay visible to the window's softmax.
        layer_windows, layer_sinks: the same per layer, for layers that differ; None follows the three fields above
            (`window_of`, `sinks_of`).
        kept_groups: per layer the numbers of the key/value groups whose query heads keep the teacher's full attention
            in a hybrid layer (its window where it had one): no window, sinks or mLSTM for them, and their keys and
            values of the whole context in the cache. [] or None: no group.
        kept_positions: "rope", the teacher's, exact without training; "log": none, and logits times log_a(t + a), a =
            kept_log_base, for students that are trained so (HyPE, arXiv 2601.22156).
        sparse_memory: (key, value) pairs per key/value group and hybrid layer that stay visible to the window's softmax
            after they have left the window, those that score best; 0: none. The cache grows by so much, at any context.
        sparse_memory_score: "residual", "weighted", or for comparison "recency" or "random" (see `sparse.scores_of`).
        mlstm_context: training context in tokens; the slowest forget gate starts with a time constant of four times
            this.
        mlstm_output_gate_bias: initial logit of the gate that mixes mLSTM (1) and window attention (0).
        mlstm_chunk_size: tokens per chunk of the chunkwise form; changes speed, not results.
        mixer_branches: "both"; "memory" or "window" clamp the output gate to 1 or 0: the other branch is not calculated
            and the cache does not hold it. A student trained so is a baseline; as an attribute of a loaded model it
            shows what each branch remembers, with a fresh cache.
        window_dropout: probability that a row of a training batch does without its window in all layers, o = 1
            (scheduled sliding-window dropout, Benfeghoul et al. 2025, arXiv 2510.05901); stage I and evaluation keep
            it. `XLSTMHybridModel.window_dropout` overrides it for a schedule.
        memory_cell: "mlstm" (Beck et al. 2024); "linear": nothing is gated, i = 0 and f = inf, the linear attention of
            Katharopoulos et al. 2020; "delta": the gated delta rule (Yang et al. 2024, arXiv 2412.06464), features of
            length 1, no normaliser; the gates are the mLSTM's parameters, with sigmoid(i) for exp(i).
        memory_rope: whether the feature maps read queries and keys after RoPE, or before it (after QK-norm in any
            case).
        memory_feature_map: "softmax", of x P_h (Hauzenberger et al. 2026); "softmax_signed", of [x P_h, -x P_h], twice
            as many features (Hedgehog, Zhang et al. 2024, arXiv 2402.04347); "silu", of x P_h, for the delta rule
            alone: its keys have to be able to be orthogonal, and no normaliser asks for positive ones. None: "silu" for
            the delta rule, else "softmax".
        memory_feature_dim: columns of each head's P_h; None: head_dim. The state grows with the features.
        mixer_norm: an RMS norm of each head's mix before W_o, with a learned weight (Beck et al. 2024). Hauzenberger et
            al. 2026 leave it out.
        mixer_combine: "gate" (Hauzenberger et al. 2026); "joint": one normaliser over the window's exponentials and the
            features of the tokens that the window does not see, with a learned factor per head (LoLCATs, Zhang et al.
            2024, arXiv 2410.10254). A baseline: quadratic in the tokens of a call, and for memory_cell="linear" alone;
            in the cache the state is of the tokens that have left the window.
        mixer_gate_input: what the output gate reads, "qkv" (Hauzenberger et al. 2026) or "x", the layer's input.

    The defaults are the paper's. In docs/arena.md (small teachers of three families on a CPU, up to three seeds) the
    mLSTM beat linear attention and the delta rule, while RoPE on the memory and the start of the output gate made no
    difference that could be told from chance. What recalled further is no default, as it costs bytes or short tasks and
    differs between families: a kept group, wider `memory_feature_dim`, windows in the first layer alone. `plan-layers`
    chooses among them for a budget.

    Raises:
        ConfigError: fields that contradict each other.
    """

    model_type = "xlstm_hybrid"
    keys_to_ignore_at_inference = NAMES
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    _rope_type_labels = ATTENTION

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    qk_norm: str | None = None
    norm_position: str = "pre"

    rope_layers: list[bool] | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    logits_scaling: float | int = 1.0
    final_logit_softcapping: float | int | None = None
    norm_plus_one: bool = False
    attention_output_gate: bool = False
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool = False
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    mlp_only_layers: list[int] | None = None
    linear_attention: str | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = None
    linear_allow_neg_eigval: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.0

    layer_types: list[str] | None = None
    teacher_layer_types: list[str] | None = None
    teacher_sliding_window: int | None = None
    sliding_window: int | None = 512
    num_sink_tokens: int = 4
    layer_windows: list[int | None] | None = None
    layer_sinks: list[int] | None = None
    kept_groups: list[list[int]] | None = None
    kept_positions: str = "rope"
    kept_log_base: float | int = 500
    sparse_memory: int = 0
    sparse_memory_score: str = "residual"

    teacher_model_type: str | None = None
    mlstm_context: int = 4096
    mlstm_output_gate_bias: float | int = -2.0
    mlstm_chunk_size: int = 64
    mixer_branches: str = "both"
    window_dropout: float | int = 0.0
    memory_cell: str = "mlstm"
    memory_rope: bool = True
    memory_feature_map: str | None = None
    memory_feature_dim: int | None = None
    mixer_norm: bool = False
    mixer_combine: str = "gate"
    mixer_gate_input: str = "qkv"

    def __post_init__(self, **kwargs):
        n = self.num_hidden_layers
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.teacher_layer_types is None:
            self.teacher_layer_types = ["full_attention"] * n
        if self.layer_types is None:
            self.layer_types = [LINEAR if kind == LINEAR else "hybrid_sliding" for kind in self.teacher_layer_types]
        self.memory_feature_map = self.memory_feature_map or ("silu" if self.memory_cell == "delta" else "softmax")
        self.check()
        if type(self).__module__ == "xlstm_hybrid.model.configuration":
            # names code beside an exported checkpoint: not used here, and not written again without it
            kwargs.pop("auto_map", None)
        # an attribute: transformers before 5.18 adds the embedding of a tied model
        self.base_model_tp_plan = self.tensor_parallel_plan()
        super().__post_init__(**kwargs)

    @property
    def auto_map(self):
        """Code beside a checkpoint; empty here, but there: TRL reads it of every class that is not transformers' own."""
        return self.__dict__.setdefault("auto_map", {})

    @auto_map.setter
    def auto_map(self, value):
        self.__dict__["auto_map"] = value

    def to_dict(self):
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    def standardize_rope_params(self):
        """As in transformers, which before 5.18 puts a rope_theta of its own beside nested dicts."""
        given = self.rope_parameters or {}
        nested = {kind: given[kind] for kind in ATTENTION if kind in given}
        self.rope_parameters = nested or self.rope_parameters
        super().standardize_rope_params()

    def validate_rope(self):
        """As in transformers, which before 5.18 looks for nested dicts under `layer_types`."""
        kinds, self.layer_types = self.layer_types, self.teacher_layer_types
        try:
            super().validate_rope()
        finally:
            self.layer_types = kinds

    def choices(self):
        """The fields that say how layers mix. They may be changed between two calls of a model, which then checks them
        again.
        """
        fields = vars(self)  # transformers' configs look every attribute up in Python
        return [fields[name] for name in CHOICES]

    def check(self):
        """Raise one `ConfigError` that lists every contradiction (a `@strict` validator would wrap it in an error of
        its own).
        """
        wrong, n, H, G = [], self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads
        if H % G:
            wrong.append(f"num_attention_heads={H} is no multiple of num_key_value_heads={G}")
        for name in PER_LAYER:
            if (entries := getattr(self, name)) is not None and len(entries) != n:
                wrong.append(f"{name} has {len(entries)} entries for num_hidden_layers={n}")
        for name, allowed in (("layer_types", LAYER_TYPES), ("teacher_layer_types", TEACHER_LAYER_TYPES)):
            if unknown := sorted(set(getattr(self, name)) - set(allowed)):
                wrong.append(f"{name} holds {unknown}: expected {list(allowed)}")
        for j, (kind, window, sinks) in enumerate(() if wrong else self.spans()):
            if kind not in ("full_attention", LINEAR) and (window is None or window < 1):
                wrong.append(f"layer {j} is {kind} with a window of {window}: expected at least 1 token")
            if sinks < 0:
                wrong.append(f"layer {j} has {sinks} sink tokens: expected 0 or more")
        if self.mlstm_chunk_size < 1:
            wrong.append(f"mlstm_chunk_size={self.mlstm_chunk_size}: expected at least 1 token")
        if self.qk_norm not in (None, "head", "full"):
            wrong.append(f"qk_norm={self.qk_norm!r}: expected None, 'head' or 'full'")
        if self.norm_position not in ("pre", "post", "both"):
            wrong.append(f"norm_position={self.norm_position!r}: expected 'pre', 'post' or 'both'")
        if self.hidden_act not in ACT2FN:
            wrong.append(f"hidden_act={self.hidden_act!r}: expected a name that transformers has in ACT2FN")
        for name in (
            *("embedding_multiplier", "residual_multiplier", "attention_multiplier"),
            *("logits_scaling", "final_logit_softcapping"),
        ):
            if (factor := getattr(self, name)) is not None and not 0 < factor < math.inf:
                wrong.append(f"{name}={factor}: expected a number above 0")
        for kind in self.attention_types if self.rope_parameters else ():
            if not 0 < (part := self.rope_parameters_of(kind).get("partial_rotary_factor", 1.0)) <= 1:
                wrong.append(f"partial_rotary_factor={part}: expected a part above 0 and at most 1")
        if self.num_experts and not 1 <= (self.num_experts_per_tok or 0) <= self.num_experts:
            wrong.append(
                f"num_experts_per_tok={self.num_experts_per_tok}: expected 1 to num_experts={self.num_experts}"
            )
        if self.num_experts and (self.moe_intermediate_size or 0) < 1:
            wrong.append(f"moe_intermediate_size={self.moe_intermediate_size}: expected the width of the experts")
        if (width := self.shared_expert_intermediate_size) is not None and width < 0:
            wrong.append(f"shared_expert_intermediate_size={width}: expected the width of the shared expert, or None")
        if odd := sorted(set(self.mlp_only_layers or ()) - set(range(n))):
            wrong.append(f"mlp_only_layers holds {odd}: expected numbers of layers from 0 to {n - 1}")
        if not self.router_aux_loss_coef >= 0:
            wrong.append(f"router_aux_loss_coef={self.router_aux_loss_coef}: expected a weight of at least 0")
        if self.output_router_logits and not self.num_experts:
            wrong.append("output_router_logits=True with num_experts=None: expected False, there is no router")
        wrong += self.wrong_mixer() or ([] if wrong else self.wrong_linear() + self.wrong_memories())
        if wrong:
            raise ConfigError("XLSTMHybridConfig: " + "; ".join(wrong))

    def wrong_mixer(self):
        """What contradicts itself among the fields of the mixer, a list of messages."""
        wrong, choices = [], {"mixer_branches": BRANCHES, "memory_cell": CELLS, "memory_feature_map": FEATURE_MAPS}
        for name, allowed in (choices | {"mixer_combine": COMBINATIONS, "mixer_gate_input": GATE_INPUTS}).items():
            if getattr(self, name) not in allowed:
                wrong.append(f"{name}={getattr(self, name)!r}: expected one of {list(allowed)}")
        if self.memory_feature_map == "silu" and self.memory_cell != "delta":
            wrong.append(
                f"memory_feature_map='silu' with memory_cell={self.memory_cell!r}: its normaliser needs positive features, expected a softmax"
            )
        if (P := self.memory_feature_dim) is not None and P < 1:
            wrong.append(f"memory_feature_dim={P}: expected at least 1 feature, or None for head_dim")
        if self.mixer_combine == "joint":  # there is no gate to clamp, and features stand alone as in linear attention
            needs = {"memory_cell": "linear", "memory_rope": True, "mixer_branches": "both"}
            for name, needed in (needs | {"window_dropout": 0, "sparse_memory": 0}).items():
                if getattr(self, name) != needed:
                    wrong.append(f"mixer_combine='joint' with {name}={getattr(self, name)!r}: expected {needed!r}")
        if not 0 <= self.window_dropout < 1:
            wrong.append(f"window_dropout={self.window_dropout}: expected a probability of at least 0 and below 1")
        elif self.window_dropout and self.mixer_branches != "both":
            wrong.append(
                f"window_dropout={self.window_dropout} with mixer_branches={self.mixer_branches!r}: expected 0, there is one branch only"
            )
        return wrong

    def wrong_linear(self):
        """What contradicts itself among the fields of linear attention, a list of messages."""
        kinds = zip(self.layer_types, self.teacher_layer_types, strict=True)
        wrong = [
            f"layer {j} is {kind}, and {teacher} in the teacher: linear layers stay as they are, and no other becomes one"
            for j, (kind, teacher) in enumerate(kinds)
            if (kind == LINEAR) != (teacher == LINEAR)
        ]
        if LINEAR in self.layer_types and self.linear_attention not in LINEAR_ATTENTION:
            wrong.append(f"linear_attention={self.linear_attention!r}: expected one of {list(LINEAR_ATTENTION)}")
        elif LINEAR in self.layer_types:
            sizes = {name: getattr(self, name) for name in LINEAR_SIZES}
            wrong += [f"{name}={size}: expected at least 1" for name, size in sizes.items() if (size or 0) < 1]
            if not wrong and self.linear_num_value_heads % self.linear_num_key_heads:
                wrong.append(
                    f"linear_num_value_heads={self.linear_num_value_heads} is no multiple of "
                    f"linear_num_key_heads={self.linear_num_key_heads}"
                )
        return wrong

    def wrong_memories(self):
        """What contradicts itself among the fields of exact memories, a list of messages."""
        wrong, G = [], self.num_key_value_heads
        for j, kept in enumerate(self.kept_groups or ()):
            if sorted(set(kept)) != sorted(kept) or not set(kept) <= set(range(G)):
                wrong.append(f"kept_groups of layer {j} are {kept}: expected different numbers from 0 to {G - 1}")
            elif kept and self.layer_types[j] != "hybrid_sliding":
                wrong.append(
                    f"layer {j} is {self.layer_types[j]} with kept_groups {kept}: expected none, all of its groups keep their attention"
                )
            elif len(kept) == G:
                wrong.append(
                    f"kept_groups of layer {j} are all {G} groups: make it {self.teacher_layer_types[j]} in layer_types"
                )
        if self.kept_positions not in ("rope", "log"):
            wrong.append(f"kept_positions={self.kept_positions!r}: expected 'rope' or 'log'")
        if not self.kept_log_base > 1:
            wrong.append(f"kept_log_base={self.kept_log_base}: expected a base above 1")
        if self.sparse_memory < 0:
            wrong.append(f"sparse_memory={self.sparse_memory}: expected 0 or more tokens")
        if self.sparse_memory_score not in SCORES:
            wrong.append(f"sparse_memory_score={self.sparse_memory_score!r}: expected one of {list(SCORES)}")
        if self.sparse_memory and self.mixer_branches != "both":
            wrong.append(
                f"sparse_memory={self.sparse_memory} with mixer_branches={self.mixer_branches!r}: expected 'both', it scores the tokens"
            )
        return wrong

    def tensor_parallel_plan(self):
        """Tensor-parallel style of each module. Heads are cut with their mLSTM; a norm over all heads (OLMo) needs them
        whole on every rank.
        """
        whole = self.qk_norm == "full"
        plan = {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" if whole else "colwise" for name in "qkv"}
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input" if whole else "rowwise"
        if self.qk_norm == "head":
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        if "hybrid_sliding" in self.layer_types and not whole:
            plan["layers.*.self_attn.mlstm"] = "mlstm_heads"  # registered in mixer.py
        if LINEAR in self.layer_types:
            plan["layers.*.linear_attn"] = "linear_attention"  # which refuses, see mixer.py
        mlp = {"gate": "colwise", "up": "colwise", "down": "rowwise"}
        return plan | {f"layers.*.mlp.{name}_proj": style for name, style in mlp.items()}

    @property
    def attention_scaling(self):
        """Factor of the products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def has_experts(self, layer_idx):
        """Whether the MLP of a layer is one of experts."""
        return bool(self.num_experts) and layer_idx not in (self.mlp_only_layers or ())

    @property
    def memory_features(self):
        """Features per head, which are the rows of the memory's state."""
        return (self.memory_feature_dim or self.head_dim) * (2 if self.memory_feature_map == "softmax_signed" else 1)

    def spans(self):
        """`[(layer type, window_of, sinks_of)]` of all layers."""
        fields = vars(self)  # as in `choices`
        kinds, windows, sinks = fields["layer_types"], fields["layer_windows"], fields["layer_sinks"]
        if windows is None:
            usual = {"hybrid_sliding": fields["sliding_window"], "sliding_attention": fields["teacher_sliding_window"]}
            windows = [usual.get(kind) for kind in kinds]
        if sinks is None:
            sinks = [fields["num_sink_tokens"] if kind == "hybrid_sliding" else 0 for kind in kinds]
        return list(zip(kinds, windows, sinks, strict=True))

    def window_of(self, layer_idx):
        """Attention window of one layer in tokens; None for full attention."""
        return self.spans()[layer_idx][1]

    def sinks_of(self, layer_idx):
        """Number of sink tokens of one layer; 0 for layers that keep the teacher's attention."""
        return self.spans()[layer_idx][2]

    def kept_of(self, layer_idx):
        """Numbers of the key/value groups that keep full attention in a hybrid layer, in order."""
        return sorted(self.kept_groups[layer_idx]) if self.kept_groups else []

    def kept_window_of(self, layer_idx):
        """Window of a layer's kept groups in tokens, the teacher's own; None for full attention."""
        return self.teacher_sliding_window if self.teacher_layer_types[layer_idx] == "sliding_attention" else None

    def mixed_heads(self, layer_idx):
        """Numbers of the query heads that mix an mLSTM with window attention, in order: all but those of kept groups."""
        repeats, kept = self.num_attention_heads // self.num_key_value_heads, set(self.kept_of(layer_idx))
        return [h for h in range(self.num_attention_heads) if h // repeats not in kept]

    @property
    def attention_types(self):
        """The teacher's kinds of layers that have queries, keys and RoPE, sorted."""
        return sorted(set(self.teacher_layer_types) - {LINEAR})

    @property
    def linear_shapes(self):
        """Of one row's states in a layer of linear attention, (channels, columns) of the convolution and (heads, K, V) of
        the memory: `{name: shape}`.
        """
        key, value = self.linear_key_head_dim, self.linear_value_head_dim
        channels = 2 * self.linear_num_key_heads * key + self.linear_num_value_heads * value
        recurrent = self.linear_num_value_heads, key, value
        return {"conv": (channels, self.linear_conv_kernel_dim), "recurrent": recurrent}

    def rope_parameters_of(self, layer_type):
        """The flat RoPE dict of a teacher layer type: its own where the teacher has several."""
        return self.rope_parameters.get(layer_type, self.rope_parameters)

    @property
    def uneven_ropes(self):
        """`{kind of layer: rope_type}` of RoPE whose angles depend on the length of the whole text, see `STEADY_ROPES`."""
        ropes = {kind: self.rope_parameters_of(kind).get("rope_type", "default") for kind in self.attention_types}
        return {kind: rope for kind, rope in ropes.items() if rope not in STEADY_ROPES}


def attention_reach(config, kinds=("hybrid_sliding", *ATTENTION)):
    """`(window, sinks)` of the layer of these `kinds` that sees furthest back by attention; window None if one sees
    everything. Of a student's configuration or any other.
    """
    config = config.get_text_config()
    if hasattr(config, "window_of"):
        pairs = [(window, sinks) for kind, window, sinks in config.spans() if kind in kinds]
    else:
        sliding = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        types = getattr(config, "layer_types", None) or [sliding]
        pairs = [(config.sliding_window if kind == "sliding_attention" else None, 0) for kind in types]
    return (None, 0) if any(window is None for window, _ in pairs) else max(pairs, key=sum)
