"""The explorer: a local page on which one looks inside models; `crate-fast explore`."""
