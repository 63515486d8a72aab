"""Weights in and out of this package: the official release, timm, transformers, torchvision, StableHLO, ONNX.

`store.open_weights` reads any checkpoint or weight file, `store.import_weights` makes a checkpoint of one,
`exporter.export_weights` writes other codes' formats, `start.start_from` begins a run from either. Below them: `names`
(released files), `files` and `pth` (containers, read without torch), `keys` (two-way tables), `architecture` (the model
behind the shapes), `importer`, `programs`.
"""
