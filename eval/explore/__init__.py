"""The explorer, `crate-fast explore`: a local page that shows what each layer of a model does."""
