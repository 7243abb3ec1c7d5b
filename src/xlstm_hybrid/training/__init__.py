"""Trainers, one file each; they need the extra `train` (trl, datasets)."""

from dataclasses import field


def option(default, help):
    """A field of a trainer's config, and what the command line and the documents say of it."""
    return field(default=default, metadata={"help": help})


def save_weights(trainer, output_dir=None, state_dict=None):
    """Weights and tokenizer of a trainer. Not `training_args.bin`: a pickle that holds the Hub token in plain text."""
    output_dir = output_dir or trainer.args.output_dir
    if state_dict:  # of a sharded model: gathered one by one, tied tensors are no longer one
        tied = getattr(trainer.model, "all_tied_weights_keys", None) or {}
        state_dict = {name: x for name, x in state_dict.items() if name not in tied}
    trainer.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=trainer.args.should_save)
    if trainer.args.should_save:
        trainer.processing_class.save_pretrained(output_dir)
