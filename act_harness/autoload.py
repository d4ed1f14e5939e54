"""The entry point that ``import torch`` calls: a shield around :mod:`act_harness.plugin`.

torch loads every entry point of the group ``torch.backends`` at the end of its own import and
turns any exception into a failed ``import torch``. So the module it loads is this one: it imports
nothing at its top, and whatever goes wrong behind it stays behind it. ``act-harness doctor`` says
what went wrong. Setting ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` keeps torch from calling this at all.
"""

__all__ = ["autoload"]


def autoload() -> None:
    """Let lm-eval know the model ``hf-act``; never raise, whatever is broken."""
    try:
        from act_harness.plugin import install

        install()
    except Exception:  # noqa: BLE001, S110 - a broken plug-in must never cost anybody their torch
        pass
