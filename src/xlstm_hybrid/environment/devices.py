"""The device to run on, as a command's `--device` names it."""

import torch

from xlstm_hybrid.errors import ConfigError


def device_of(asked=None):
    """Name of the device to run on; of None and "auto" a GPU if there is one.

    Raises:
        ConfigError: torch knows no such device, or finds none.
    """
    if asked in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
        count = torch.get_device_module(device).device_count()
    except (AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"--device {asked}: expected auto, cpu, cuda or one GPU of several, such as cuda:0"
        ) from error
    if not count:
        raise ConfigError(
            f"--device {asked}: torch finds no GPU; use --device cpu, or install torch for CUDA and its driver"
        )
    if (device.index or 0) >= count:
        raise ConfigError(f"--device {asked}: torch finds {count} of this kind, expected a number below {count}")
    return asked
