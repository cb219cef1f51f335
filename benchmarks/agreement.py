"""Whether two models compute the same: how far output and gradients are apart, and how far they may be."""

from torch import Tensor, cat

__all__ = ["SLACK", "TIGHT", "WORST", "differences"]

OUTPUT, GRADIENT, WORST = "output", "gradient", "a parameter's gradient"
# Rounding that moves a ReLU's argument across zero changes one parameter's gradient by up to a few 1e-3 of its norm;
# a scale that is off by 2 %, or a missing term, changes some parameter's by more than 1e-2.
TIGHT = {OUTPUT: 1e-4, GRADIENT: 1e-3, WORST: 1e-2}  # in fp32
# In bf16 such ReLUs are many: on a few images the gradient of either form was 1 to 6 % from fp32's, one parameter's 6
# to 25 %, and which was nearer changed with the images. So these come on top of twice the other form's distance.
SLACK = {OUTPUT: 0.01, GRADIENT: 0.1, WORST: 0.3}


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative norms of the differences: of the output, of the whole gradient, the largest of a parameter's.

    Args:
        found, expected: "output", and the gradients by their parameters' names; without gradients (inference) the
            output alone is compared.

    Raises:
        ValueError: Other parameters have a gradient here than there.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())}")
    result = {OUTPUT: _relative(found[OUTPUT], expected[OUTPUT])}
    names = [name for name in expected if name != OUTPUT]
    if names:
        whole = (cat([tensors[name].flatten() for name in names]) for tensors in (found, expected))
        result[GRADIENT] = _relative(*whole)
        result[WORST] = max(_relative(found[name], expected[name]) for name in names)
    return result
