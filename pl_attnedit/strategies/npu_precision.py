"""Precision on NPUs: Lightning's own plugins, with the autocast of the device type `npu`."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from pl_attnedit.errors import invalid


def npu_precision(plugin: Precision) -> Precision:
    """The plugin that Lightning chose for a `precision`, as one for NPUs: its `bf16-mixed` would be autocast of CUDA.

    Raises:
        UserError: float16 and pure bfloat16, which lose gradients and updates here as elsewhere; float64, fp8 and what else
            NPUs are not used with.
    """
    if type(plugin) is Precision:
        return plugin
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", device="npu")
    raise invalid("precision", plugin.precision, "on NPUs it must be 32-true or bf16-mixed")
