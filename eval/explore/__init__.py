"""The explorer, `crate-fast explore`: a local web page about the layers of a model."""
