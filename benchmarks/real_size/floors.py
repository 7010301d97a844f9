"""The least time that a device allows: what must be computed, what must be moved, and how fast the device did either.

Source:  the roofline model (Williams et al. 2009): no call is faster than its FLOPs over the measured matmul rate, nor than the
         bytes it must move over the measured copy rate.
Differs: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a call must do at least: floating-point operations and bytes through memory, each weight read once."""

    flops: int
    n_bytes: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What this device reached: a large matrix product, and a large copy (bytes read plus bytes written)."""

    matmul_tflops: float
    copy_gb_per_s: float

    def floor_ms(self, work: Work) -> tuple[float, str]:
        """The least time, and what bounds it.

        >>> Ceilings(matmul_tflops=500.0, copy_gb_per_s=2000.0).floor_ms(Work(flops=10**12, n_bytes=10**9))
        (2.0, 'arithmetic')
        """
        by_arithmetic = work.flops / (self.matmul_tflops * 1e9)
        by_memory = work.n_bytes / (self.copy_gb_per_s * 1e6)
        return (by_arithmetic, "arithmetic") if by_arithmetic >= by_memory else (by_memory, "memory")
