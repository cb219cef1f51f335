"""The experiment `crate-fast reproduce emergence`.

It tests whether segmentation emerges in CRATE but not in a ViT under plain supervised training. `protocol` holds all
settings and `command` the command line. `runs` trains and scores several runs in parallel. `scores` scores one
checkpoint, `results` compares models over seeds, and `report` and `figures` write the report from saved results.
"""
