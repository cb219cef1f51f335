"""Evaluation protocols (`crate_fast.eval`): one file each, with `evaluate(model, …) -> dict` and `main(argv)`."""
