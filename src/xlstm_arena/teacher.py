"""The arena's teachers: two to three million parameters of three families, trained on the arena's language until they
recall at every length tested.

A lookup is laid into the fresh weights, because finding it from nothing takes a small model longer than all the rest:
layer 0 has a head that brings along the word before (Olsson et al. 2022: a previous-token head), layer 1 one that
attends to where the word before was the present key. Then everything trains, short rows first. Positions jump ahead at
random places, so that short rows already show every distance up to the longest test (position skips as in PoSE, Zhu et
al. 2024).

Dims: n rows, L tokens of a row, K head dim.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PreTrainedTokenizerFast, Qwen3Config

from xlstm_arena import data
from xlstm_arena.scoring import hits_of
from xlstm_hybrid.checkpoint.files import add_provenance, staged, write_manifest
from xlstm_hybrid.errors import ConfigError

FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "olmo2": Olmo2Config}
SHAPE = {
    "vocab_size": data.VOCAB,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 640,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": data.BOS,
    "eos_token_id": data.EOS,
    "pad_token_id": data.PAD,
}
# OLMo 2 shares no keys and values between heads; eight layers of it make 48 KV groups, so that one kept group is a
# fiftieth of the cache
SHAPES = {"olmo2": {"num_hidden_layers": 8, "num_key_value_heads": 6, "intermediate_size": 320}}
REACH = 2304  # positions that training visits: the longest test and some room
STAGES = (
    {"length": 128, "rows": 24, "steps": 500, "recall_share": 0.3},
    {"length": 512, "rows": 6, "steps": 250, "recall_share": 0.35},
    {"length": 2048, "rows": 2, "steps": 200, "recall_share": 0.5},
)
# of the residual stream: what the laid-in lookup reads and writes
CONSTANT, CODE, BEFORE, FOUND = 0, range(1, 33), range(96, 128), range(128, 160)


def untrained_teacher(family, seed=0):
    """A fresh model of a family.

    Raises:
        ConfigError: a family that the arena has no teacher of.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")
    torch.manual_seed(seed)
    shape = SHAPE | SHAPES.get(family, {})
    if family == "olmo2":
        shape.pop("head_dim")
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**shape), dtype=torch.float32)
    lay_in_lookup(model, family, torch.Generator().manual_seed(seed + 1))
    return model


# --- the lookup that is laid in --------------------------------------------------------------------------------


def codes(generator, slow):
    """[512, 32] unit vectors of the words; those of the keys fill `slow` dims and lie far from each other, nobody
    else's do.
    """
    keys = torch.nn.functional.normalize(torch.randn(len(data.KEYS), slow, generator=generator), dim=1)
    for _ in range(300):  # away from the nearest
        near = (12 * (keys @ keys.T).fill_diagonal_(-1)).exp()
        keys = torch.nn.functional.normalize(keys - 0.05 * near @ keys / near.sum(1, keepdim=True), dim=1)
    found = torch.randn(data.VOCAB, len(CODE), generator=generator)
    found[:, :slow] = 0
    found[data.KEYS] = 0
    found[data.KEYS, :slow] = keys
    return torch.nn.functional.normalize(found, dim=1)


def previous_token_rope(theta, K, size):
    """`(query, key)` [K] of a head whose score is greatest one token back, whatever the tokens: only the fastest pairs
    of RoPE speak.
    """
    angle, amplitude = theta ** (-torch.arange(K // 2) / (K // 2)), torch.zeros(K // 2)
    amplitude[:4] = size
    return torch.cat([amplitude * angle.cos(), -amplitude * angle.sin()]), torch.cat([amplitude, torch.zeros(K // 2)])


@torch.no_grad()
def lay_in_lookup(model, family, generator):
    """Write a previous-token head into layer 0 and a matching head into layer 1 of a fresh model (head 0 of both)."""
    before, match = (layer.self_attn for layer in model.model.layers[:2])
    K, half = before.head_dim, before.head_dim // 2
    # pairs of RoPE that hardly turn within the longest test
    slow = [j + part * half for part in (0, 1) for j in range(9, half - 1)]
    words, gain = codes(generator, len(slow)), {"llama": 5.0, "qwen3": 3.0, "olmo2": 3.0}[family]
    embedding = model.model.embed_tokens.weight
    embedding[:, CONSTANT], embedding[:, CODE] = 0.3, 0.5 * words
    if family != "llama":  # QK-norm makes noise as long as a key: what is not laid in begins quietly
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.2
            layer.mlp.down_proj.weight *= 0.2
    if family == "olmo2":  # norms after attention and MLP: what they add begins as small as the embeddings
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(0.05)
            layer.post_feedforward_layernorm.weight.fill_(0.02)
    # what the norm before the layer multiplies by
    scale = 1.0 if family == "olmo2" else 1 / embedding.square().mean(1).sqrt().mean()
    query, key = previous_token_rope(SHAPE["rope_theta"], K, 7.0)
    before.q_proj.weight[:K, CONSTANT], before.k_proj.weight[:K, CONSTANT] = query / (0.3 * scale), key / (0.3 * scale)
    copy_words(before, CODE, BEFORE, 1 / scale)
    copy_words(match, CODE, FOUND, 1 / scale)
    match.q_proj.weight[slow] *= 0.1
    match.k_proj.weight[slow] *= 0.1
    match.q_proj.weight[slow, CODE[: len(slow)]] = match.k_proj.weight[slow, BEFORE[: len(slow)]] = gain
    model.lm_head.weight[data.VALUES, FOUND.start : FOUND.stop] += 0.5 * words[data.VALUES]
    if family != "llama":
        match.k_proj.weight[half - 1, CONSTANT] = gain / 2  # where no key is, the vector points here
        for norm in (before.q_norm, before.k_norm, match.q_norm, match.k_norm):
            norm.weight.fill_(1.8 if family == "qwen3" else 1.0)


def copy_words(attention, source, target, gain):
    """Head 0 copies the residual dims `source` to `target`."""
    K = len(source)
    attention.v_proj.weight[:K] *= 0.1
    attention.v_proj.weight[range(K), source] = 1.0
    attention.o_proj.weight[target, :K] *= 0.1
    attention.o_proj.weight[target, range(K)] = float(gain)


# --- training --------------------------------------------------------------------------------------------------


def jumping_positions(rng, length, count, reach=REACH, jumps=3):
    """[n, L] positions that begin at 0 and skip ahead at up to `jumps` places, to a random end below `reach`."""
    spare = rng.integers(max(reach - length, 0) + 1, size=count)
    cuts = np.sort(rng.integers(length, size=(count, jumps)), -1)
    shares = rng.dirichlet(np.ones(jumps), size=count)
    skip = np.zeros((count, length), dtype=np.int64)
    for j in range(jumps):
        np.add.at(skip, (np.arange(count), cuts[:, j]), (spare * shares[:, j]).astype(np.int64))
    return torch.from_numpy(np.arange(length) + skip.cumsum(-1))


def batches(stages, seed):
    """`(inputs, labels)` of every step: rows without padding, positions that jump."""
    for number, stage in enumerate(stages):
        rng = np.random.default_rng([seed, number])
        count, length = stage["rows"], stage["length"]
        for _ in range(stage["steps"]):
            rows = [data.training_document(rng, length, stage["recall_share"]) for _ in range(count)]
            ids, labels = (torch.tensor([row[j] for row in rows]) for j in (0, 1))
            yield {"input_ids": ids, "position_ids": jumping_positions(rng, length, count)}, labels


def train_teacher(family, out, stages=STAGES, seed=0, learning_rate=1.5e-3, progress=print, overwrite=False):
    """Train a teacher and write it as an ordinary checkpoint directory, with its accuracies in the provenance.

    Args:
        family: of FAMILIES.
        stages: dicts of length, rows, steps and recall_share, one after the other under one schedule.
    Returns:
        {kind: {length: accuracy}}, see `accuracies`.
    """
    start, model = time.time(), untrained_teacher(family, seed)
    steps = sum(stage["steps"] for stage in stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = min(0.5, 60 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warmup)
    for step, (batch, labels) in enumerate(batches(stages, seed)):
        hidden = model.model(**batch, attention_mask=torch.ones_like(labels), use_cache=False).last_hidden_state[:, :-1]
        scored = labels[:, 1:] != -100
        logits, wanted = model.lm_head(hidden[scored]), labels[:, 1:][scored]
        loss = cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            hit = (logits.argmax(-1) == wanted)[torch.isin(wanted, torch.tensor(data.VALUES))].float().mean()
            seconds = time.time() - start
            progress(f"{family}: step {step} of {steps}, loss {loss:.3f}, recall {hit:.3f}, {seconds:.0f} s")
    figures = accuracies(model.eval())
    with staged(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        config = {"family": family, "stages": list(stages), "learning_rate": learning_rate, "seed": seed}
        seconds = round(time.time() - start, 1)
        add_provenance(folder, "teacher", config=config, figures={"accuracy": figures}, seconds=seconds)
        write_manifest(folder)
    return figures


def provide(arena, names, out, make=True):
    """Point an arena at its teachers: at the file's directories where they are there, else at OUT/teachers/NAME. Those
    of `names` that are in neither place are trained first if `make`; the others' results may be in OUT as well, and a
    report asks for their teachers.

    Raises:
        ConfigError: a teacher of `names` that is not there and whose name is no family.
    """
    for name in arena.teachers:
        directory = (Path(out) / "teachers" / name).absolute()
        if arena.teacher_dir(name).is_dir():
            continue
        if name in names and not directory.is_dir() and name not in FAMILIES:
            raise ConfigError(
                f"{arena.path.name}: no teacher at {arena.teachers[name]}, and {name!r} is none of the families that can "
                f"be trained: expected a checkpoint there, or one of {', '.join(FAMILIES)}"
            )
        arena.teachers[name] = str(directory)
        if name in names and make and not directory.is_dir():
            train_teacher(name, directory)


def accuracies(model, lengths=(64, 128, 256, 512, 1024, 2048), count=64, seed=100):
    """{kind: {length: accuracy}} of a model on the arena's tests, short kinds under the one length that they have."""
    found = {}
    for kind in (*data.LONG, *data.SHORT):
        for length in lengths if kind in data.LONG else (data.SHORT_LENGTH,):
            hits = hits_of(model, data.tests(kind, length, count, seed), batch_tokens=16384)
            found.setdefault(kind, {})[length] = round(hits.double().mean().item(), 4)
    return found


def tokenizer():
    """One word per token, `<0>` to `<511>`: checkpoints carry a tokenizer as others do. No word is a part of another,
    special ones would split it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"<{j}>": j for j in range(data.VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token=f"<{data.PAD}>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": f"<{data.BOS}>", "eos_token": f"<{data.EOS}>", "pad_token": f"<{data.PAD}>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)
