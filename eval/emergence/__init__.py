"""Does segmentation appear in CRATE, and not in a ViT, under plain supervised training? The paper's claim, as an
experiment that fits a machine:

    crate-fast reproduce emergence --size small

`protocol` fixes every choice before a run; `command` reads the command line; `schedule` starts runs and continues
them; `job` is one run, trained and then scored by `scores`; `analysis` compares models over seeds; `report` and
`figures` write what came out, from saved results alone.
"""
