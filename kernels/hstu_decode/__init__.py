"""The newest positions of cached histories through all layers of HSTU, in one call of compiled code."""

from kernels.hstu_decode.ops import LayerForm, LayerWeights, hstu_decode, is_available, takes

__all__ = ["LayerForm", "LayerWeights", "hstu_decode", "is_available", "takes"]
