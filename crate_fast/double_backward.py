"""What an operator without a second derivative says when it is asked for one."""

from torch.library import CustomOpDef

__all__ = ["refuse_double_backward"]


def refuse_double_backward(op: CustomOpDef, remedy: str) -> None:
    """Make differentiating a backward operator an error that says what to do instead."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op._qualname} cannot be differentiated again (a second derivative was asked for): {remedy}, "
            "or use crate_fast.reference"
        )

    op.register_autograd(refuse)
