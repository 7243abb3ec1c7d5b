"""Trainers, one file each; they need the extra `train` (trl, datasets)."""


def save_weights(trainer, output_dir=None, state_dict=None):
    """Weights and tokenizer of a trainer. Not `training_args.bin`: a pickle that holds the Hub token in plain text."""
    output_dir = output_dir or trainer.args.output_dir
    trainer.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=trainer.args.should_save)
    if trainer.args.should_save:
        trainer.processing_class.save_pretrained(output_dir)
