"""Each protocol through its public entry, with odd settings, against NumPy.

The images and labels are random, so that every figure lies far from 0 and 100% and any change of a setting moves it.
Every test also asserts that its settings matter: with a mistake, the expected figures would be others.
"""

from __future__ import annotations

import functools
import pickle

import jax
import numpy as np
import pytest
import scipy.optimize
from PIL import Image

from dino_jax.eval.masks import open_masks
from dino_jax.eval.protocols import copydetection, dense, knn, linear, lowshot, retrieval, voc, vos
from dino_jax.eval.protocols.vos import open_videos

IMAGENET = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])


def normalized(images, std=IMAGENET[1]):
    return ((np.stack(images) / 255 - IMAGENET[0]) / std).astype(np.float32)


@functools.cache
def jitted(backbone, method=None, **options):
    return jax.jit(lambda variables, images: backbone.apply(variables, images, method=method, **options))


def cls_of(model, images):
    """CLS features [N, D]."""
    return np.asarray(jitted(model.backbone)(model.variables, normalized(images)), np.float64)


def patches_of(model, images, std=IMAGENET[1]):
    """Patch tokens [N, h, w, D]."""
    return np.asarray(jitted(model.backbone, "tokens")(model.variables, normalized(images, std)).patches[0], np.float64)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def noise(rng, *shape):
    """Smooth noise, uint8 [*shape, 3]."""
    coarse = rng.integers(256, size=(*shape[:-2], 5, 5, 3), dtype=np.uint8)
    flat = [Image.fromarray(x).resize(shape[:-3:-1], Image.Resampling.BICUBIC) for x in coarse.reshape(-1, 5, 5, 3)]
    return np.stack([np.asarray(x) for x in flat]).reshape(*shape, 3)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """`TRAIN,TEST` for --data, and both as (images [N, 20, 26, 3], labels [N]) of seven classes told by faint tints."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("splits")
    tints, parts = rng.normal(0, 60, (7, 1, 1, 3)), []
    for name, count in (("train", 150), ("test", 120)):
        labels = rng.integers(7, size=count)
        images = np.clip(noise(rng, count, 20, 26) + tints[labels], 0, 255).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        parts.append((images, labels))
    return f"arrays:{folder / 'train.npz'},arrays:{folder / 'test.npz'}", *parts


def odd_view(config):
    config.resize, config.crop, config.batch_size = 18, 16, 11
    return config


def viewed(images):
    """Each image shrunk to 18 x 23, then its center 16 x 16."""
    shrunk = [np.asarray(Image.fromarray(image).resize((23, 18), Image.Resampling.BICUBIC)) for image in images]
    return [image[1:17, 4:20] for image in shrunk]


def knn_accuracy(train, train_labels, test, test_labels, k, temperature):
    ranks = []
    similarities = unit(test) @ unit(train).T
    for similarity, label in zip(similarities, test_labels, strict=True):
        near = np.argsort(-similarity, kind="stable")[:k]
        votes = np.bincount(train_labels[near], np.exp(similarity[near] / temperature), 7)
        ranks.append(list(np.argsort(-votes, kind="stable")).index(label))
    return 100 * np.mean(np.array(ranks) < 1), 100 * np.mean(np.array(ranks) < min(5, k))


def test_knn(vit, splits):
    data, (train, train_labels), (test, test_labels) = splits
    config = odd_view(knn.PROTOCOL.default_config())
    config.k, config.temperature = (1, 3, 40, 150, 151), 0.002  # 150 is every image, 151 is skipped
    figures = knn.evaluate(vit, data, config)
    features = [cls_of(vit, viewed(images)) for images in (train, test)]
    problem = features[0], train_labels, features[1], test_labels
    expected = {}
    for k in (1, 3, 40, 150):
        expected[f"top1_k{k}"], expected[f"top5_k{k}"] = knn_accuracy(*problem, k, 0.002)
    assert figures == pytest.approx(expected)
    assert 20 < expected["top1_k3"] < 90
    for k in (40, 150):
        assert knn_accuracy(*problem, k, 0.07) != knn_accuracy(*problem, k, 0.002)


def test_nearest_ranks_every_row_and_no_padding():
    """With negative similarities, rows of zeros that fill the last chunk would rank in front of half of the bank."""
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(150, 6)) - 0.7, rng.normal(size=(9, 6)) + 0.7
    similarities, rows = knn.nearest(queries, bank, 150, chunk=128)
    expected = unit(queries) @ unit(bank).T
    order = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(expected, order, 1), atol=1e-6)
    assert np.mean(expected < 0) > 0.7


def logistic(features, labels, penalty):
    """Weights [D, 7] of the regression without intercept: mean cross-entropy + penalty / 2 |W|^2."""

    def objective(flat):
        weights = flat.reshape(-1, 7)
        logits = features @ weights
        logits -= logits.max(1, keepdims=True)
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        grad = features.T @ (np.exp(log_share) - np.eye(7)[labels]) / len(labels) + penalty * weights
        value = -log_share[np.arange(len(labels)), labels].mean() + penalty / 2 * np.sum(weights**2)
        return value, grad.ravel()

    start = np.zeros(features.shape[1] * 7)
    found = scipy.optimize.minimize(objective, start, jac=True, options={"gtol": 1e-7, "maxiter": 5000})
    return found.x.reshape(-1, 7)


def test_lowshot(vit, splits):
    data, (train, train_labels), (test, test_labels) = splits
    config = odd_view(lowshot.PROTOCOL.default_config())
    config.update({"shares": (0.37, 1.0), "penalty": 4.0, "seed": 4, "tolerance": 1e-7})
    figures = lowshot.evaluate(vit, data, config)
    features, test_features = (cls_of(vit, viewed(images)) for images in (train, test))

    def accuracy(rows, penalty):
        weights = logistic(features[rows], train_labels[rows], penalty)
        return 100 * np.mean(np.argmax(test_features @ weights, axis=1) == test_labels)

    def subset(share, seed):
        rows = []
        for label in range(7):
            mine = np.random.default_rng((seed, label + 1)).permutation(np.flatnonzero(train_labels == label))
            rows += mine[: round(share * len(mine))].tolist()
        return rows

    for share in config.shares:
        rows = subset(share, 4)
        assert figures[f"top1_{100 * share:g}%"] == pytest.approx(accuracy(rows, 4.0 / len(rows)))
        assert accuracy(rows, 4.0) != accuracy(rows, 4.0 / len(rows)) != accuracy(rows, 0.1 / len(rows))
        assert 0 <= figures[f"gap_{100 * share:g}%"] <= config.tolerance
    rows, others = (subset(0.37, seed) for seed in (4, 0))
    assert accuracy(rows, 4.0 / len(rows)) != accuracy(others, 4.0 / len(others))


@pytest.fixture(scope="module")
def plain_splits(tmp_path_factory):
    """Images of one color each, the same in every crop: (data, features' images and labels of train, of test)."""
    rng, folder, parts = np.random.default_rng(2), tmp_path_factory.mktemp("plain"), []
    for name, count in (("train", 36), ("test", 60)):
        images = np.broadcast_to(rng.integers(256, size=(count, 1, 1, 3), dtype=np.uint8), (count, 16, 16, 3))
        labels = np.where(rng.random(count) < 0.5, images[:, 0, 0].argmax(1), rng.integers(3, size=count))
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        parts.append((images, labels))
    return f"arrays:{folder / 'train.npz'},arrays:{folder / 'test.npz'}", *parts


def sgd(inputs, labels, kernel, bias, rates):
    """Softmax regression on the whole batch, one step for each learning rate; yields (kernel, bias)."""
    momentum = np.zeros_like(kernel), np.zeros_like(bias)
    for rate in rates:
        logits = inputs @ kernel + bias
        share = np.exp(logits - logits.max(1, keepdims=True))
        grad = (share / share.sum(1, keepdims=True) - np.eye(3)[labels]) / len(labels)
        momentum = 0.9 * momentum[0] + inputs.T @ grad, 0.9 * momentum[1] + grad.sum(0)
        kernel, bias = kernel - rate * momentum[0], bias - rate * momentum[1]
        yield kernel, bias


@pytest.mark.parametrize("holdout", [0.0, 0.4])
def test_linear(vit, plain_splits, holdout):
    """Every epoch is one batch: no draw matters but the start, and with `holdout` the split."""
    data, train, test = plain_splits
    config = linear.PROTOCOL.default_config()
    config.update({"features": ("2", "1+avg"), "lrs": (0.02, 0.7, 9.0), "epochs": 6, "eval_every": 2, "seed": 4})
    config.update({"resize": 0, "crop": 16, "batch_size": 40, "holdout": holdout})
    figures = linear.evaluate(vit, data, config)
    held = np.random.default_rng(4).permutation(36)[:14] if holdout else np.arange(0)
    kept = np.setdiff1d(np.arange(36), held)
    tokens = [jitted(vit.backbone, "tokens", n=2)(vit.variables, normalized(images)) for images, _ in (train, test)]
    rng, history = np.random.default_rng(4), {}  # head -> for each evaluation: accuracy on test and held-out images
    for choice in ("1+avg", "2"):  # sorted, as they are drawn
        two = [np.concatenate([t.cls[0], t.cls[1]], 1) for t in tokens]
        avg = [np.stack([t.cls[1], t.flat_patches[1].mean(1)], -1).reshape(-1, 32) for t in tokens]
        inputs, test_inputs = two if choice == "2" else avg
        start = rng.normal(0, 0.01, (1, 32, 3))[0]
        for lr in config.lrs:
            rates = [lr * 40 / 256 * (1 + np.cos(np.pi * epoch / 6)) / 2 for epoch in range(6)]
            scores = []
            for kernel, bias in list(sgd(inputs[kept], train[1][kept], start, np.zeros(3), rates))[1::2]:
                right = lambda x, labels: 100 * np.mean(np.argmax(x @ kernel + bias, 1) == labels)  # noqa: B023, E731
                scores.append((right(test_inputs, test[1]), right(inputs[held], train[1][held]) if holdout else 0.0))
            history[f"{choice} lr={lr:g}"] = scores
    by = 1 if holdout else 0  # 0: the test images decide
    best = {head: max(range(3), key=lambda i: (scores[i][by], -i)) for head, scores in history.items()}
    head = max(history, key=lambda name: history[name][best[name]][by])
    for name, scores in history.items():
        assert figures[f"top1_{name}"] == pytest.approx(scores[best[name]][0], abs=1e-4), name
    assert (figures["head"], figures["epoch"]) == (head, 2 * best[head] + 2)
    assert figures["top1"] == pytest.approx(history[head][best[head]][0], abs=1e-4)
    if holdout:  # the test images would have chosen another
        assert figures["top1"] < max(score for scores in history.values() for score, _ in scores)


def propagated(context, target, radius, topk, temperature):
    """Soft labels [h, w, L] of one frame, patch by patch; `context`: pairs of features [h, w, D] and labels."""
    height, width, _ = target.shape
    out = np.zeros((height, width, context[0][1].shape[-1]))
    for i, j in np.ndindex(height, width):
        near = slice(max(0, i - radius), i + radius + 1), slice(max(0, j - radius), j + radius + 1)
        keys = np.concatenate([unit(features[near]).reshape(-1, features.shape[-1]) for features, _ in context])
        labels = np.concatenate([values[near].reshape(-1, values.shape[-1]) for _, values in context])
        similarity = keys @ unit(target[i, j])
        best = np.argsort(-similarity, kind="stable")[:topk]
        weight = np.exp((similarity[best] - similarity[best[0]]) / temperature)
        out[i, j] = weight @ labels[best] / weight.sum()
    return out


def enlarged(soft, scale):
    """Labels [h * scale, w * scale]: bilinear, each label stretched to 0..1, the largest wins."""
    for axis in (0, 1):
        size = soft.shape[axis]
        places = np.clip((np.arange(size * scale) + 0.5) / scale - 0.5, 0, size - 1)
        soft = np.apply_along_axis(lambda line, p=places: np.interp(p, np.arange(len(line)), line), axis, soft)
    low, high = soft.min((0, 1)), soft.max((0, 1))
    return np.argmax(np.where(high > 0, (soft - low) / np.where(high > low, high - low, 1), soft), -1)


def segmented(features, first, *, context, radius, topk, temperature, anchor=True):
    """Label maps of a video from its features [T, h, w, D] and its first annotation."""
    soft = np.eye(4)[first[2::4, 2::4]]
    start, before, maps = (features[0], soft), [], [first]
    for target in features[1:]:
        sources = ([start] if anchor or not before else []) + before[-context:]
        soft = propagated(sources, target, radius, topk, temperature)
        before.append((target, soft))
        maps.append(enlarged(soft, 4))
    return np.stack(maps)


def test_vos(vit, tmp_path):
    data = "scenes:val?size=1&image_size=32"
    config = vos.PROTOCOL.default_config()
    odd = {"context": 2, "radius": 3, "topk": 7, "temperature": 0.6}
    config.update({"size": 32, "multiple": 8, "batch_size": 5, **odd})
    figures = vos.evaluate(vit, data, config, workdir=str(tmp_path))
    (folder,) = tmp_path.glob("vos-*/*/")
    found = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    (video,) = open_videos(data, "val")
    truth = video.truth()
    features = patches_of(vit, [video.frame(t) for t in range(len(truth))], std=(0.228, 0.224, 0.225))
    expected = segmented(features, truth[0], **odd)
    assert np.mean(found != expected) < 1e-3
    swapped = {**odd, "radius": 7, "topk": 3}
    others = [{**odd, "temperature": 0.1}, swapped, {**odd, "anchor": False}, {**odd, "context": 7}, {**odd, "topk": 5}]
    assert min(np.mean(segmented(features, truth[0], **other) != expected) for other in others) > 3e-3
    ious = []
    for number in range(1, truth[0].max() + 1):
        a, b = (maps[1:-1] == number for maps in (expected, truth))
        ious.append(np.mean((a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1)))
    assert figures["J_mean"] == pytest.approx(100 * np.mean(ious), abs=0.1)


def ap(ranks, positives):
    """Average precision by trapezoids."""
    total = 0.0
    for found, rank in enumerate(sorted(ranks)):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / 2 / positives
    return total


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Copydays: 12 originals, 2 strong copies of each; 60 images to whiten with and 15 distractors, all 24 x 24."""
    rng, root, found = np.random.default_rng(3), tmp_path_factory.mktemp("copies"), {}
    originals = noise(rng, 12, 24, 24)
    strong = [np.uint8(0.6 * image + 0.4 * noise(rng, 1, 24, 24)[0]) for image in originals for _ in range(2)]
    for name, images, names in (
        ("days/original", originals, [f"2{i:03d}00" for i in range(12)]),
        ("days/strong", strong, [f"2{i // 2:03d}0{i % 2 + 1}" for i in range(24)]),
        ("white", noise(rng, 60, 24, 24), [str(i) for i in range(60)]),
        ("others", noise(rng, 15, 24, 24), [str(i) for i in range(15)]),
    ):
        (root / name).mkdir(parents=True)
        for image, stem in zip(images, names, strict=True):
            Image.fromarray(image).save(root / name / f"{stem}.png")
        found[name] = [np.asarray(Image.open(path)) for path in sorted((root / name).iterdir())]
    return root, found


def test_copydetection(vit, copies):
    root, images = copies
    config = copydetection.PROTOCOL.default_config()
    config.update({"size": 8, "batch_size": 7, "whitening": str(root / "white"), "distractors": str(root / "others")})
    figures = copydetection.evaluate(vit, str(root / "days"), config)

    def features(name, cls_in_gem=False):
        shrunk = [Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC) for image in images[name]]
        pixels = [np.asarray(image) for image in shrunk]
        cls, patches = cls_of(vit, pixels), patches_of(vit, pixels).reshape(len(pixels), 4, -1)
        if cls_in_gem:
            patches = np.concatenate([cls[:, None], patches], 1)
        return np.concatenate([cls, np.mean(np.maximum(patches, 1e-6) ** 4, axis=1) ** 0.25], axis=1)

    def score(white=True, others=True, **options):
        bank, queries, base = (features(name, **options) for name in ("days/original", "days/strong", "white"))
        bank = np.concatenate([bank, features("others", **options)]) if others else bank
        if white:
            values, vectors = np.linalg.eigh(base.T @ base / len(base))
            projection = vectors / np.sqrt(np.maximum(values, values.max() * 1e-5))
            bank, queries = ((x - base.mean(0)) @ projection for x in (bank, queries))
        order = np.argsort(-unit(queries) @ unit(bank).T, axis=1)[:, :20]
        return 100 * np.mean([ap(np.flatnonzero(row == i // 2), 1) for i, row in enumerate(order)])

    assert figures["map_strong"] == pytest.approx(score(), abs=0.05)
    for mistake in ({"white": False}, {"others": False}, {"cls_in_gem": True}):
        assert abs(score(**mistake) - score()) > 0.5, mistake


def test_retrieval(vit, tmp_path):
    rng, root = np.random.default_rng(4), tmp_path / "rparis6k"
    (root / "jpg").mkdir(parents=True)
    queries = noise(rng, 5, 30, 30)
    bank = np.uint8(0.5 * queries[np.arange(40) % 5] + 0.5 * noise(rng, 40, 30, 30))
    for name, images in (("q", queries), ("b", bank)):
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / "jpg" / f"{name}{i}.jpg", format="PNG")
    truth = []
    for q in range(5):
        mine = rng.permutation(np.flatnonzero(np.arange(40) % 5 == q))
        truth.append({"bbx": [0.0] * 4, "easy": mine[:2], "hard": mine[2:5], "junk": mine[5:8]})
    names = {"imlist": [f"b{i}" for i in range(40)], "qimlist": [f"q{i}" for i in range(5)]}
    (root / "gnd_rparis6k.pkl").write_bytes(pickle.dumps({**names, "gnd": truth}))
    config = retrieval.PROTOCOL.default_config()
    config.update({"size": 24, "batch_size": 6, "multiscale": True})
    figures = retrieval.evaluate(vit, str(tmp_path), config)

    def shrunk(image, scale):
        image = Image.fromarray(image)
        image.thumbnail((24, 24), Image.Resampling.LANCZOS)
        pixels, side = np.asarray(image, float), int(24 * scale)
        places = np.clip((np.arange(side) + 0.5) / scale - 0.5, 0, 23)
        for axis in (0, 1):
            pixels = np.apply_along_axis(lambda line: np.interp(places, np.arange(24), line), axis, pixels)
        return pixels[: side // 4 * 4, : side // 4 * 4]

    def features(images, scales):
        return np.mean([cls_of(vit, [shrunk(image, scale) for image in images]) for scale in scales], axis=0)

    def score(good, ignored, scales=(1, 2**-0.5, 0.5)):
        order = np.argsort(-unit(features(queries, scales)) @ unit(features(bank, scales)).T, axis=1)
        scores = []
        for row, entry in zip(order, truth, strict=True):
            junk = np.concatenate([entry[key] for key in ignored]) if ignored else []
            positives = np.concatenate([entry[key] for key in good])
            kept = [place for place in row if place not in junk]
            scores.append(ap([rank for rank, place in enumerate(kept) if place in positives], len(positives)))
        return 100 * np.mean(scores)

    medium, hard = score(("easy", "hard"), ("junk",)), score(("hard",), ("junk", "easy"))
    assert figures["rparis6k_map_medium"] == pytest.approx(medium, abs=0.05)
    assert figures["rparis6k_map_hard"] == pytest.approx(hard, abs=0.05)
    for wrong in (score(("easy", "hard"), ()), score(("hard",), ("junk",)), score(("easy",), ("junk", "hard"))):
        assert min(abs(wrong - medium), abs(wrong - hard)) > 0.5
    assert abs(score(("easy", "hard"), ("junk",), scales=(1,)) - medium) > 0.2


def test_voc(vit):
    data = "scenes:val?size=9&image_size=32"
    config = voc.PROTOCOL.default_config()
    config.update({"masses": (0.35, 0.9), "size": 33, "block": 0, "batch_size": 4})
    figures = voc.evaluate(vit, data, config)
    short = vit.backbone.clone(depth=1)
    params = {k: v for k, v in vit.variables["params"].items() if k != "blocks_1"}  # its last block is block 0
    images = [open_masks(data, "val").load(i) for i in range(9)]
    weights = jitted(short, "attention")({"params": params}, normalized([image.pixels for image in images]))
    attention = np.asarray(weights, np.float64)[:, :, 0, 1:]  # [9, H, 64]

    def score(mass):
        scores = []
        for heads, image in zip(attention, images, strict=True):
            masks = []
            for row in heads:
                order = np.argsort(-row)
                count = np.searchsorted(np.cumsum(row[order]) / row.sum(), mass) + 1
                mask = np.zeros(64, bool)
                mask[order[:count]] = True
                masks.append(np.kron(mask.reshape(8, 8), np.ones((4, 4), bool)))
            objects = [image.objects == n for n in np.unique(image.objects) if n not in (0, 255)]
            scores.append(np.mean([max((m & o).sum() / (m | o).sum() for m in masks) for o in objects]))
        return 100 * np.mean(scores)

    assert figures == pytest.approx({"jaccard_35": score(0.35), "jaccard_90": score(0.9)}, abs=0.1)
    assert min(abs(score(a) - score(b)) for a, b in ((0.35, 0.65), (0.9, 0.1), (0.35, 0.6), (0.9, 0.8))) > 0.3


def test_dense(vit, tmp_path):
    """Crops of the whole image, and one batch an epoch: only the flips are drawn."""
    rng, parts = np.random.default_rng(6), []
    for split in ("train", "val"):
        images = noise(rng, 6, 32, 32)
        labels = images.argmax(-1).astype(np.uint8)  # the channel that is brightest
        parts.append((images, labels))
        for i, arrays in enumerate(zip(images, labels, strict=True)):
            for folder, array in zip(("images", "masks"), arrays, strict=True):
                (tmp_path / split / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / split / folder / f"{i}.png")
    (images, labels), (others, truth) = parts
    config = dense.PROTOCOL.default_config()
    config.update({"size": 33, "epochs": 4, "batch_size": 8, "lr": 0.3, "weight_decay": 0.9, "seed": 5})
    config.scale = (1.0, 1.0)
    figures = dense.evaluate(vit, str(tmp_path), config)
    places = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    large = np.array([np.interp(places, np.arange(8), row) for row in np.eye(8)])  # [8, 32]

    def logits(head, tokens):
        return np.einsum("iy,jx,bijk->byxk", large, large, tokens @ head[0] + head[1])

    def gradient(head, tokens, labels):
        """Of the mean cross-entropy, for kernel [D, 3] and bias."""
        share = np.exp(logits(head, tokens))
        share = (share / share.sum(-1, keepdims=True) - np.eye(3)[labels]) / labels.size
        small = np.einsum("iy,jx,byxk->bijk", large, large, share)
        return np.einsum("bijd,bijk->dk", tokens, small), small.sum((0, 1, 2))

    def score(decay=0.9, lr=0.3, flips=True):
        head = [np.zeros((16, 3)), np.zeros(3)]
        m, v = ([0 * x for x in head] for _ in range(2))
        for epoch in range(4):
            rngs = [np.random.default_rng((5, epoch, row)) for row in range(6)]
            turned = [flips and (rng.random((1, 10, 4)), rng.random())[1] < 0.5 for rng in rngs]
            flip = lambda arrays: np.stack([x[:, ::-1] if t else x for x, t in zip(arrays, turned, strict=True)])  # noqa: B023, E731
            tokens = patches_of(vit, flip(images))
            grads = gradient(head, tokens, flip(labels))
            for i, g in enumerate(grads):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                step = m[i] / (1 - 0.9 ** (epoch + 1)) / (np.sqrt(v[i] / (1 - 0.999 ** (epoch + 1))) + 1e-8)
                head[i] = head[i] - lr * (1 + np.cos(np.pi * epoch / 4)) / 2 * (step + decay * head[i])
        guess = logits(head, patches_of(vit, others)).argmax(-1)
        shares = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in range(3)]
        return {"miou": 100 * np.mean(shares), "pixel_accuracy": 100 * np.mean(guess == truth)}

    assert figures == pytest.approx(score(), abs=0.05)
    for mistake in ({"decay": 1e-4}, {"lr": 0.1}, {"flips": False}):
        assert abs(score(**mistake)["pixel_accuracy"] - figures["pixel_accuracy"]) > 0.1, mistake
