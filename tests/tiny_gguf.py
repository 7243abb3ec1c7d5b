"""Tiny teachers as GGUF files, written with gguf's own writer in the layout of llama.cpp: its names, and q and k of a
Llama with their rotary halves interleaved.
"""

import json

import gguf
import numpy as np
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, n, part = stem.split(".", 3)
        return f"blk.{n}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(x, heads):
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, model, tokenizer=None, kind="F32", extra=None, tensors=None):
    """Write a model of transformers as a GGUF file.

    Args:
        kind: of the matrices, "F32", "F16", "Q8_0"; vectors are F32.
        tokenizer: directory with a tokenizer.json of byte-level BPE.
        extra: {key behind the architecture: value}.
        tensors: further tensors {name: array}.
    """
    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type != "qwen2":
        writer.add_rope_dimension_count(config.head_dim)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{config.model_type}.{key}", value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for name, parameter in model.named_parameters():
        x = parameter.detach().float().numpy()
        if config.model_type == "llama" and "q_proj" in name:
            x = interleaved(x, config.num_attention_heads)
        if config.model_type == "llama" and "k_proj" in name:
            x = interleaved(x, config.num_key_value_heads)
        x = np.ascontiguousarray(x)
        if x.ndim == 1 or kind.name == "F32":
            writer.add_tensor(gguf_name(name), x)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(x, kind), raw_dtype=kind)
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, directory):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    named = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    special = {t["content"] for t in content["added_tokens"] if t["special"]}
    ordered = sorted(tokens, key=tokens.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(ordered)
    writer.add_token_types([3 if token in special else 1 for token in ordered])
    merges = content["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    for role in ("bos", "eos", "pad"):
        if named.get(f"{role}_token") is not None:
            getattr(writer, f"add_{role}_token_id")(tokens[named[f"{role}_token"]])
    if named.get("bos_token") and named["bos_token"] in json.dumps(content["post_processor"]):
        writer.add_add_bos_token(True)
    if (directory / "chat_template.jinja").is_file():
        writer.add_chat_template((directory / "chat_template.jinja").read_text(encoding="utf-8"))


def byte_level_tokenizer(folder):
    """Write a tokenizer of byte-level BPE with the rules of Qwen2, a chat template and 262 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("i", "n")]
    vocab = {token: j for j, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token=None
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    made.save_pretrained(folder)


def installed_package(folder, name, version, files):
    """Make `folder` hold an installed Python distribution with a package whose import fails, and these files in it, each
    written by a function of its path; returns the package's folder.
    """
    module = name.replace("-", "_")
    package, record = folder / module, folder / f"{module}-{version}.dist-info"
    package.mkdir(parents=True)
    record.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')\n")
    for file, write in files.items():
        write(package / file)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (record / "RECORD").write_text("".join(f"{module}/{file},,\n" for file in ("__init__.py", *files)))
    return package
