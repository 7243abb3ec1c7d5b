"""Configuration of the Distil-xLSTM student: which blocks it has, and how wide they are."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.cache_names import NAMES
from xlstm_hybrid.model.configuration import StudentConfig

BLOCKS = ("slstm", "mlstm")
FORGET_GATES = ("sigmoid", "exp")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlstm_num_heads", "conv_kernel_size")
SIZES += ("mlstm_projection_block", "mlstm_context", "mlstm_chunk_size", "slstm_intermediate_size")


@strict
class DistilXLSTMConfig(StudentConfig):
    """Sizes of a stack of sLSTM and mLSTM blocks (Beck et al. 2024; Thiombiano et al. 2025).

    Args:
        num_attention_heads: heads H of the sLSTM, which are what its recurrent weights connect; D must be a multiple.
        block_pattern: blocks in turn, repeated up to the last layer; ["slstm", "mlstm"] is the paper's 1:1, ["mlstm"] *
            7 + ["slstm"] is 7:1.
        block_types: one block per layer instead; what `block_pattern` gives if None.
        conv_kernel_size: tokens that the causal convolution of a block sees, the present one included.
        mlstm_expansion: width of the mLSTM's inside, and of its gate, relative to D.
        mlstm_num_heads: None: as many as make its heads as wide as the sLSTM's.
        mlstm_projection_block: q, k and v are projected in blocks of so many features.
        mlstm_context: training context in tokens; the slowest forget gates start with a time constant of four times
            this.
        mlstm_chunk_size: tokens per chunk of the chunkwise form; changes speed, not results.
        slstm_intermediate_size: width of the gated MLP of an sLSTM block; None: 4/3 D, rounded up to a multiple of 64.
        slstm_forget_gate: "sigmoid" or "exp" (both in Beck et al. 2024).
        hidden_act: of that MLP.
        initializer_range: standard deviation of new matrices; None: sqrt(2 / (5 D)).
        freeze_embeddings: token embedding and LM head do not train.
        teacher_model_type: what the embeddings come from.
    Raises:
        ConfigError: fields that contradict each other.
    """

    model_type = "distil_xlstm"
    keys_to_ignore_at_inference = NAMES

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    block_pattern: list[str] | None = None
    block_types: list[str] | None = None
    conv_kernel_size: int = 4
    mlstm_expansion: float | int = 2.0
    mlstm_num_heads: int | None = None
    mlstm_projection_block: int = 4
    mlstm_context: int = 512
    mlstm_chunk_size: int = 64
    slstm_intermediate_size: int | None = None
    slstm_forget_gate: str = "sigmoid"
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    freeze_embeddings: bool = True
    teacher_model_type: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        D, H = self.hidden_size, self.num_attention_heads
        self.block_pattern = pattern = list(BLOCKS) if self.block_pattern is None else self.block_pattern
        if not pattern or set(pattern) - set(BLOCKS):
            raise ConfigError(f"DistilXLSTMConfig: block_pattern={pattern}: expected a list of {list(BLOCKS)}")
        if self.block_types is None and len(pattern) > self.num_hidden_layers:
            raise ConfigError(
                f"DistilXLSTMConfig: block_pattern has {len(pattern)} blocks for num_hidden_layers={self.num_hidden_layers}, its end "
                "would never be reached; shorten it, or take more layers"
            )
        if self.block_types is None:
            self.block_types = [pattern[j % len(pattern)] for j in range(self.num_hidden_layers)]
        if self.slstm_intermediate_size is None:
            self.slstm_intermediate_size = 64 * math.ceil(4 * D / (3 * 64))
        if self.mlstm_num_heads is None:
            self.mlstm_num_heads = max(self.inner_size * H // D, 1)
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * D))
        self.check()
        super().__post_init__(**kwargs)

    @property
    def inner_size(self):
        """Features inside an mLSTM block: all its heads."""
        return round(self.mlstm_expansion * self.hidden_size)

    def check(self):
        """Raise one `ConfigError` that lists every contradiction."""
        D, H, kinds = self.hidden_size, self.num_attention_heads, self.block_types
        sizes = [(name, getattr(self, name), 2 if name == "conv_kernel_size" else 1) for name in SIZES]
        wrong = [f"{name}={value}: expected at least {low}" for name, value, low in sizes if value < low]
        if not wrong and D % H:
            wrong.append(f"hidden_size={D} is no multiple of num_attention_heads={H}")
        if len(kinds) != self.num_hidden_layers:
            wrong.append(f"block_types has {len(kinds)} entries for num_hidden_layers={self.num_hidden_layers}")
        if unknown := sorted(set(kinds) - set(BLOCKS)):
            wrong.append(f"block_types holds {unknown}: expected {list(BLOCKS)}")
        if self.inner_size < 1:
            wrong.append(f"mlstm_expansion={self.mlstm_expansion}: leaves no features")
        elif not wrong:
            inner = f"the mLSTM's {self.inner_size} features (mlstm_expansion x hidden_size)"
            divisors = [(name, getattr(self, name)) for name in ("mlstm_num_heads", "mlstm_projection_block")]
            wrong += [f"{inner} are no multiple of {name}={n}" for name, n in divisors if self.inner_size % n]
        if self.slstm_forget_gate not in FORGET_GATES:
            wrong.append(f"slstm_forget_gate={self.slstm_forget_gate!r}: expected one of {list(FORGET_GATES)}")
        if self.hidden_act not in ACT2FN:
            wrong.append(f"hidden_act={self.hidden_act!r}: not an activation that transformers knows")
        if wrong:
            raise ConfigError("DistilXLSTMConfig: " + "; ".join(wrong))
