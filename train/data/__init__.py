"""Training data, from image files to batches.

`sources` opens folders and data sets, and returns image and label by index; `shards` does the same for tar archives.
`image_files` finds image files and decodes them to upright 8-bit RGB; `shape_scenes` generates images instead.
`transforms` crops and augments decoded images in a worker, with generators seeded by the sample's key.
`loader` makes uint8 batches in an order that depends on seed and epoch alone; the device normalises them.
A corrupt image raises `Unreadable`: training replaces it, evaluation skips it, and the batch lists it.
"""
