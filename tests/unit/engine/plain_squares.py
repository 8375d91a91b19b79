"""The squares generator in plain integers, to compare with."""

_MASK = 2**64 - 1


def plain_squares32(counter: int, key: int) -> int:
    """The paper's function in plain integers (arXiv 2004.06278, section 3)."""
    x = (counter * key) & _MASK
    y = x
    z = (y + key) & _MASK
    for addend in (y, z, y):
        x = (x * x + addend) & _MASK
        x = (x >> 32) | ((x << 32) & _MASK)
    return ((x * x + z) & _MASK) >> 32
