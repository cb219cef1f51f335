"""Training (`crate_fast.train`): configuration, data, the loop, and the scripts that users start."""
