"""The experiment `crate-fast reproduce emergence`.

Does segmentation appear in CRATE, and not in a ViT, under plain supervised training? `protocol` holds all settings,
`command` the command line; `runs` trains and scores several runs at a time; `scores` scores a checkpoint, `results`
compares models over seeds; `report` and `figures` write the report from saved results alone.
"""
