"""Weights in and out of this package: the official release, timm, transformers, torchvision, StableHLO, ONNX.

`load.open_weights` reads any checkpoint or weight file, `exporter.export_weights` writes other libraries' formats,
`checkpoint` saves and restores runs. Below them: `names` (released files), `containers` and `pth` (file formats, read
without torch), `keys` (two-way key tables), `architecture` (infers the model from shapes), `importer`, `programs`.
"""
