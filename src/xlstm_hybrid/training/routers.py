"""Routers of experts: they do not learn unless asked, and where they learn a loss keeps the experts' load balanced."""

import warnings

from xlstm_hybrid.errors import ConfigError

ROUTER = ".mlp.gate."  # what the name of a router's parameter contains


def freeze_routers(model):
    """Let no router of a model learn."""
    for name, parameter in model.named_parameters():
        if ROUTER in name:
            parameter.requires_grad_(False)


def balance_weight(model, asked=None):
    """Weight of the loss that balances experts, in the training of a model: 0 where no router learns.

    Args:
        asked: the trainer's `router_aux_loss_coef`; None: that of the model's configuration.
    Raises:
        ConfigError: a weight is asked for, and no router learns, or it is no weight.
    """
    learns = any(ROUTER in name and p.requires_grad for name, p in model.named_parameters())
    if asked is not None and not 0 <= asked < float("inf"):
        raise ConfigError(f"router_aux_loss_coef={asked}: expected a finite weight of at least 0")
    if not learns:
        if asked:
            raise ConfigError(
                f"router_aux_loss_coef={asked}: no router of this {type(model).__name__} learns, there is nothing to balance; leave "
                "it out, or let them learn: train='all_and_routers' in distillation, train_routers=True on-policy"
            )
        return 0.0
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) if asked is None else asked
    if not weight and asked is None:
        warnings.warn(
            "routers learn without a loss that balances the experts, the model's router_aux_loss_coef is 0: set it in the trainer's "
            "arguments (0.001 in Qwen3-MoE, 0.01 in OLMoE), or to 0.0 if that is meant",
            stacklevel=3,
        )
    return weight


def balanced_forward(trainer, model, weight, **inputs):
    """`(what `with_head` returns, weight times the loss that balances experts or None)` of a micro-batch; the second is
    logged as `aux_loss`, before its weight, and divided by the micro-batches of a step as TRL does.
    """
    if not weight:
        return model(**inputs), None
    found, loss = model(**inputs, output_router_logits=True)
    training = trainer.model.training
    totals = trainer.accelerator.gather(loss.detach().float()[None]).mean(0, keepdim=True)
    trainer.readings.note("train" if training else "eval", totals, lambda values: {"aux_loss": values[0]})
    return found, weight * loss / (trainer.current_gradient_accumulation_steps if training else 1)
