"""The counter behind the sampling noise: which random number belongs to which draw.

The noise of a token is a function of (seed, choice, position, draw, token id) alone, so it is the same in any
batch, on any worker and on any device. The first four are hashed to a 64-bit key here, once per row; the ops
hash the key with each token id:

    x = mix(token * GOLDEN + low word of key);  x = mix(x ^ high word of key)

with `mix` the 32-bit finaliser below (multiplications modulo 2**32). The low 31 bits of x, plus a half and
scaled to (0, 1), are the uniform number v; the noise is -log(-log(1 - v)), a standard Gumbel variable.
"""

from __future__ import annotations

GOLDEN = 0x9E3779B9
# mix(x): x ^= x >> 16; x *= MIX_1; x ^= x >> 15; x *= MIX_2; x ^= x >> 16   (C. Wellons' lowbias32)
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
# v stays below 1, where its logarithm ends.
MAX_UNIFORM = 1.0 - 2.0**-24

_MASK_64 = (1 << 64) - 1


def noise_key(seed: int, choice: int, position: int, draw: int = 0) -> tuple[int, int]:
    """Returns the key as two signed 32-bit words (low, high). `draw` numbers several draws at one position."""
    key = 0
    for word in (seed, choice, position, draw):
        key = _mix_64((key ^ (word & _MASK_64)) + 0x9E3779B97F4A7C15)
    return as_int32(key), as_int32(key >> 32)


def as_int32(value: int) -> int:
    """The low 32 bits read as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _mix_64(x: int) -> int:
    # The finaliser of SplitMix64.
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
