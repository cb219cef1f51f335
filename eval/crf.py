"""Optional refinement of a mask by a dense conditional random field (paper, B.4; its Table 1 does without)."""

import numpy as np

from crate_fast.errors import UserError

__all__ = ["refine", "require_crf"]

_ITERATIONS = 10
_GAUSSIAN = {"sxy": 3, "compat": 7}
_BILATERAL = {"sxy": 50, "srgb": 5, "compat": 10}
_SMALLEST_IOU = 0.5


def require_crf():
    """The library's module `pydensecrf.densecrf`.

    Raises:
        UserError: It is not installed; the message says how.
    """
    try:
        from pydensecrf import densecrf
    except ModuleNotFoundError as error:
        raise UserError(
            "the CRF needs pydensecrf: pip install 'crate_fast[crf]' (it is compiled: a C++ compiler must be there), "
            "or leave --crf out"
        ) from error
    return densecrf


def refine(mask: np.ndarray, image: np.ndarray) -> np.ndarray | None:
    """A mask's edges drawn to the image's, and its holes filled.

    Krähenbühl and Koltun's mean-field inference, with CutLER's constants: 10 iterations; a Gaussian of 3 pixels,
    weight 7; a bilateral one of 50 pixels and 5 grey levels, weight 10; the mask's label has probability e/(1 + e).

    Args:
        mask: Boolean [H, W].
        image: uint8 [H, W, 3].

    Returns:
        Boolean [H, W]; None if the field turned the mask into another one (IoU below ½).
    """
    from scipy.ndimage import binary_fill_holes

    densecrf = require_crf()
    logits = np.stack([~mask, mask]).astype(np.float32)
    log_probability = logits - np.log(np.exp(logits).sum(axis=0))
    field = densecrf.DenseCRF2D(mask.shape[1], mask.shape[0], 2)
    field.setUnaryEnergy(np.ascontiguousarray(-log_probability.reshape(2, -1)))
    field.addPairwiseGaussian(**_GAUSSIAN)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **_BILATERAL)
    refined = np.argmax(field.inference(_ITERATIONS), axis=0).reshape(mask.shape).astype(bool)
    refined = binary_fill_holes(refined)
    union = (refined | mask).sum()
    return refined if union and (refined & mask).sum() / union >= _SMALLEST_IOU else None
