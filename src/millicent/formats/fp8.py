"""FP8 W8A8: e4m3 weights with an FP32 scale for each output channel, e4m3 activations with one for each token.

y = (codes of x . codes of w) scale_x scale_w + b, the sum in FP32. Scales per row on both sides let one outlier cost its own
token or channel alone. Tensor cores multiply such codes since Ada and Hopper.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from millicent.errors import InputError, MachineError
from millicent.formats.quantize import quantize_rows
from millicent.formats.scaled import ScaledLinear, dequantize
from millicent.kernels import choose

__all__ = ["FP8Linear", "check_sides", "default_backend", "dequantize", "quantize"]

Backend = Literal["torch", "triton"]
MULTIPLE = 16
ADA = (8, 9)
# https://github.com/pytorch/pytorch/issues/177651
FIRST_TORCH_THAT_RETURNS_ON_ADA = (2, 12)
# where torch's product with scales per row is compiled for the card alone (sm_103a, sm_121a): https://github.com/pytorch/pytorch/pull/162956
# and 167734. Without that code it fails in the midst of the kernel, or writes nothing
COMPILED_ALONE, FIRST_TORCH_WITH_IT, FIRST_CUDA_WITH_IT = ((10, 3), (12, 1)), (2, 10), (12, 9)
# with scales per row cuBLAS has none for few rows of many columns (https://github.com/pytorch/ao/issues/4582), and torch none for
# some cards
_NO_PRODUCT = ("CUBLAS_STATUS_NOT_SUPPORTED", "Rowwise scaling is not currently supported")
# device, rows, n, k, and whether there is a bias, as one linear of a shape has found for all that are like it
_WITHOUT_PRODUCT: set[tuple[torch.device, int, int, int, bool]] = set()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) FP32 or BF16 -> codes (N, K) float8_e4m3fn, scales (N, 1) FP32."""
    return quantize_rows(weight.float(), "fp8")


def check_sides(n: int, k: int, format_name: str) -> None:
    """Raises InputError unless 16 divides both sides of the weight (N, K), as the tensor cores' products want it."""
    if n % MULTIPLE or k % MULTIPLE:
        raise InputError(
            f"{format_name} wants weights whose sides {MULTIPLE} divides; this one is ({n}, {k}).", "Keep this layer in BF16."
        )


def default_backend(capability: tuple[int, int]) -> Backend:
    """Who multiplies on a card of this compute capability: PyTorch, or our kernel where PyTorch's would hang or may be missing."""
    return "triton" if _hangs(capability) or _may_be_missing(capability) else "torch"


def _hangs(capability: tuple[int, int]) -> bool:
    return capability == ADA and _first_two(torch.__version__) < FIRST_TORCH_THAT_RETURNS_ON_ADA


def _may_be_missing(capability: tuple[int, int]) -> bool:
    built_with = _first_two(torch.version.cuda or "0.0")
    return capability in COMPILED_ALONE and (_first_two(torch.__version__) < FIRST_TORCH_WITH_IT or built_with < FIRST_CUDA_WITH_IT)


def _first_two(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


class FP8Linear(ScaledLinear):
    """y = x w^T + b, of x (..., K), in the dtype of x; rounded to BF16 on the way, as the products give it.

    backend: who multiplies on a CUDA card; None for default_backend, and for our kernel where cuBLAS has no product for so many
    rows. Elsewhere the same arithmetic is done in FP32.
    """

    code: Literal["fp8"] = "fp8"
    group = 1

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend | None = None) -> None:
        """codes (N, K) float8_e4m3fn; scale (N, 1) or (1, 1) FP32; bias (N,) or None.

        Raises InputError for sides that 16 does not divide.
        """
        assert codes.dtype == torch.float8_e4m3fn, codes.dtype
        n, k = codes.shape
        check_sides(n, k, "FP8")
        super().__init__(codes, scale.expand(n, 1).contiguous(), None if bias is None else bias.bfloat16())
        self.backend = backend

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """weight (N, K) BF16 or FP32, quantized where it lies; bias (N,) or None."""
        return cls(*quantize(weight), bias)

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """values (M, K) float8_e4m3fn, scale (M, 1) FP32 -> (M, N) BF16, in `out` if given.

        Raises MachineError for a card without FP8, and for PyTorch's product where it is known to hang.
        """
        assert values.dtype == torch.float8_e4m3fn, values.dtype
        assert scale is not None
        if values.device.type != "cuda":
            return self._emulate(values, scale, out)
        shape = values.device, len(values), self.out_features, self.in_features, self.bias is not None
        if self._choose_backend(values.device) == "torch" and (self.backend is not None or shape not in _WITHOUT_PRODUCT):
            try:
                return self._multiply_by_torch(values, scale, out)
            except RuntimeError as error:
                if self.backend is not None or not any(words in str(error) for words in _NO_PRODUCT):
                    raise
                _WITHOUT_PRODUCT.add(shape)
        from millicent.kernels.matmul import scaled_matmul

        if out is None:
            out = torch.empty(len(values), self.out_features, dtype=torch.bfloat16, device=values.device)
        return scaled_matmul(values, scale, self.weight, self.weight_scale, self.bias, out)

    def forward(self, x: Tensor) -> Tensor:
        rows = choose(x.device).quantize_rows(x.reshape(-1, self.in_features), self.code)
        return self.matmul(rows.values, rows.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _choose_backend(self, device: torch.device) -> Backend:
        capability = torch.cuda.get_device_capability(device)
        if capability < ADA:
            found = f"FP8 products want compute capability 8.9 or later; this card has {capability[0]}.{capability[1]}."
            raise MachineError(found, "Choose INT8, which this card multiplies at full speed.")
        if self.backend == "torch" and _hangs(capability):
            raise MachineError(
                f"torch {torch.__version__} hangs on this card (8.9) in FP8 products with scales per row, pytorch issue 177651.",
                "Install torch 2.12 or later, or use the Triton backend.",
            )
        return self.backend or default_backend(capability)

    def _multiply_by_torch(self, values: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        product = torch.empty(len(values), self.out_features, dtype=torch.bfloat16, device=values.device) if out is None else out
        # the product with scales per row writes whole rows only
        dense = product if product.is_contiguous() else torch.empty_like(product, memory_format=torch.contiguous_format)
        torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale.t(),
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=dense,
        )
        return product if dense is product else product.copy_(dense)

    def _emulate(self, values: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        y = values.float() @ self.weight.float().t() * scale * self.weight_scale.t()
        y = (y if self.bias is None else y + self.bias.float()).bfloat16()
        return y if out is None else out.copy_(y)
