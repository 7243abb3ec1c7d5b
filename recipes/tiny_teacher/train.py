"""Make the tiny teacher from nothing: tokenizer, Llama, curriculum. Writes the checkpoint and its log.

    python recipes/tiny_teacher/train.py [--out DIR] [--steps-scale 1.0]

Forty minutes or so on two cores. Document boundaries are kept by restarting position_ids, as in padding-free packing.
"""

import argparse
import itertools
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.environment.precision import prefers

HERE = Path(__file__).parent
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Instruction: {{ m.content }}\nOutput:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(vocab_size):
    """Byte-level BPE with every digit and capital letter a token of its own, so that numbers and keys are read letter
    by letter.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(pattern=Regex(r"\d| ?[A-Z]|\n"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    letters = " ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    task_text = [
        "".join(q + a for q, a in e.turns) for d in tasks.DOMAINS for e in itertools.islice(tasks.examples(d, 0), 500)
    ]
    special = ["<|pad|>", "<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*tasks.text_chunks()[::3], *task_text, *[f" {letters}"] * 3000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def induction_row(rng, vocab_size, length):
    """Random tokens in which a segment of random length repeats at a random offset; only the second copy is scored."""
    ids = [rng.randrange(3, vocab_size) for _ in range(length)]
    n = rng.randint(4, length // 2 - 2)
    first = rng.randint(1, length - 2 * n)
    second = rng.randint(first + n, length - n)
    ids[0], ids[second : second + n] = 1, ids[first : first + n]
    labels = [-100] * length
    labels[second + 1 : second + n] = ids[second + 1 : second + n]
    return {"input_ids": ids, "labels": labels, "position_ids": list(range(length))}


def collate(rows):
    return {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}


def optimizers(model, learning_rate, weight_decay):
    """Muon for the matrices (it forms the induction head in a third of AdamW's steps), AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def save(model, tokenizer, out):
    checkpoint = LlamaForCausalLM(model.config).to(torch.bfloat16)
    checkpoint.load_state_dict(model.state_dict())
    checkpoint.generation_config.update(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=32, use_cache=True
    )
    checkpoint.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="shorten every phase, to try the recipe")
    options = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    torch.manual_seed(config["seed"])
    rng = random.Random(config["seed"])
    tokenizer = make_tokenizer(config["model"]["vocab_size"])
    model = LlamaForCausalLM(LlamaConfig(**config["model"], bos_token_id=1, eos_token_id=2, pad_token_id=0))
    opts = optimizers(model, config["learning_rate"], config["weight_decay"])
    plan = [(p, j) for p in config["phases"] for j in range(max(1, round(p["steps"] * options.steps_scale)))]
    log, losses, start = [], [], time.time()
    narrow, why = prefers("cpu")
    print(f"{model.num_parameters():,} parameters, {len(plan)} steps; {why}", flush=True)
    for step, (phase, j) in enumerate(plan):
        if j == 0:
            documents = phase["kind"] == "tasks" and tasks.training_documents(
                rng, tokenizer, config["mixture"], tuple(phase["pairs"])
            )
        length = phase["sequence_length"]
        rows = [
            tasks.packed_row(documents, length) if documents else induction_row(rng, len(tokenizer), length)
            for _ in range(phase["batch_size"])
        ]
        rate = config["learning_rate"] * min(
            1, (step + 1) / 50, (len(plan) - step) / (len(plan) * config["decay_share"])
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = model(**collate(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == len(plan):
            log.append(
                {
                    "step": step + 1,
                    "loss": round(sum(losses) / len(losses), 4),
                    "learning_rate": rate,
                    "seconds": round(time.time() - start),
                }
            )
            print(log[-1], flush=True)
            losses = []
        if (step + 1) % 500 == 0 or step + 1 == len(plan):
            save(model, tokenizer, options.out)
    (options.out / "training_log.json").write_text(
        json.dumps({"config": config, "parameters": model.num_parameters(), "log": log}, indent=1)
    )


if __name__ == "__main__":
    main()
