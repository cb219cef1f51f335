"""The explorer, `crate-fast explore`: a local page that shows the inside of models."""
