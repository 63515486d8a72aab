"""From a source to batches: grain, random access by one integer, the same batches on any number of workers.

The data position is the number of examples that the whole run has consumed. An epoch is `N // batch_size` steps; its
order is a permutation drawn from (seed, epoch), of which the last `N % batch_size` examples are left out. Every random
draw for an example comes from a counter-based generator keyed by (seed, salt, epoch, example index), so a pipeline
rebuilt at a position goes on exactly where another stopped, on any number of processes, workers or threads.

A batch is a dict. b: the rows of this process; n: `crops.local_count`; C: channels; K = 2 + n crops; S: `data.canvas`.

`data.render = "host"`: crops rendered by PIL
    globals   uint8 [b, 2, H, W, C]
    locals    uint8 [b, n, h, w, C]
`data.render = "device"`: crops left to the accelerator
    canvas    uint8 [b, S, S, C]   the picture in the top left corner, zeros elsewhere
    size      int32 [b, 2]         its true height and width on the canvas
    params    `crops.CropParams` with a leading axis b: box int32 [b, K, 4] (top, left, height, width in canvas
              pixels), flip bool [b, K], order int32 [b, K, 4], factors float32 [b, K, 4], jitter bool [b, K],
              gray bool [b, K], blur float32 [b, K], solarize bool [b, K]
in both
    label     int32 [b]            -1: unknown
    index     int64 [b]            the example that was read
    bad       list of (index, name, reason): pictures of this batch that could not be read and were replaced; plain
              Python, so take it out (`batch.pop("bad")`) before sending the rest to a device

A picture whose longer side exceeds the canvas is first shrunk to it (JPEG: partly by the decoder), and its boxes are
drawn on the shrunk picture: they are whole pixels of the canvas, and the same share of the picture up to that rounding.
Evaluation batches (`make_eval_dataset`) hold image uint8 [b, H, W, C], label, index, valid bool [b] (False: padding of
the last batch, or an unreadable picture) and bad.
"""

from __future__ import annotations
