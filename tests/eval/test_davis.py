from __future__ import annotations

import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.eval import davis


def square(size, top, left, side):
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def brute_force_contour(mask):
    """Reference by definition: a pixel differs from an existing right, lower or lower right neighbor."""
    h, w = mask.shape
    edges = np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            others = [mask[i, j + 1]] if j + 1 < w else []
            others += [mask[i + 1, j]] if i + 1 < h else []
            others += [mask[i + 1, j + 1]] if i + 1 < h and j + 1 < w else []
            edges[i, j] = any(other != mask[i, j] for other in others)
    return edges


def brute_force_boundary(prediction, truth):
    radius = np.ceil(0.008 * np.linalg.norm(truth.shape))
    edges, true_edges = (np.argwhere(brute_force_contour(mask)) for mask in (prediction, truth))
    near = np.linalg.norm(edges[:, None] - true_edges[None], axis=-1) <= radius
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_region_by_hand():
    a, b, empty = square(10, 2, 2, 4), square(10, 4, 2, 4), np.zeros((10, 10), bool)
    values = davis.region(np.stack([a, a, empty, a]), np.stack([b, a, empty, empty]))
    np.testing.assert_allclose(values, [1 / 3, 1, 1, 0])


def test_boundary_by_hand():
    mask, far, empty = square(200, 50, 50, 40), square(200, 120, 120, 40), np.zeros((200, 200), bool)
    assert davis.boundary(mask, mask) == 1
    assert davis.boundary(mask, far) == 0
    assert davis.boundary(empty, empty) == 1
    assert davis.boundary(mask, empty) == davis.boundary(empty, mask) == 0
    # the radius is ceil(0.008 * 282.8) = 3 pixels: a square grown by 3 on each side matches except at its corners
    assert davis.boundary(square(200, 47, 47, 46), mask) < 1  # corners are 3 * sqrt(2) away
    assert davis.boundary(square(200, 47, 50, 40), mask) == 1  # moved by 3 along an axis
    assert davis.boundary(square(200, 46, 46, 48), mask) == 0  # grown by 4: nothing is within 3


@pytest.mark.parametrize("seed", range(4))
def test_boundary_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(20, 60)), int(rng.integers(20, 130)))
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    blob = lambda: np.hypot(yy - rng.uniform(0, shape[0]), xx - rng.uniform(0, shape[1])) < rng.uniform(4, 25)  # noqa: E731
    prediction, truth = blob() | blob(), blob() | blob()
    np.testing.assert_array_equal(davis.contour(prediction), brute_force_contour(prediction))
    assert davis.boundary(prediction, truth) == pytest.approx(brute_force_boundary(prediction, truth))


@pytest.mark.extra
def test_boundary_equals_opencv_dilation():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(9)
    edges = rng.random((90, 120)) > 0.995
    for radius in (1, 3, 8):
        span = np.arange(-radius, radius + 1)
        disk = (np.add.outer(span**2, span**2) <= radius**2).astype(np.uint8)
        wanted = cv2.dilate(edges.astype(np.uint8), disk).astype(bool)
        np.testing.assert_array_equal(davis._near(edges, radius), wanted)


@pytest.mark.extra
def test_a_video_equals_an_independent_implementation():
    """vos-benchmark scores every frame given, so it gets only those that count; it reports J and F per object."""
    pytest.importorskip("cv2"), pytest.importorskip("skimage")
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    rng = np.random.default_rng(4)
    yy, xx = np.mgrid[:120, :200]
    truth, prediction = np.zeros((2, 7, 120, 200), np.uint8)
    for labels in (truth, prediction):
        for t in range(7):
            for number, (top, left) in enumerate(((40, 60), (70, 130)), 1):
                shift = rng.uniform(-6, 6, 2) if labels is prediction else (0, 0)
                labels[t][np.hypot(yy - top - 3 * t - shift[0], xx - left + 4 * t - shift[1]) < 18 + 5 * number] = (
                    number
                )
    prediction[3][prediction[3] == 2] = 0  # lost in one frame
    for frame, wanted in zip(prediction[1:-1], truth[1:-1], strict=True):
        evaluator.feed_frame(frame, wanted)
    j, f = evaluator.conclude()
    found = davis.score_video(prediction, truth)
    for number in (1, 2):
        assert 100 * found[number - 1]["J"]["mean"] == pytest.approx(j[number])
        assert 100 * found[number - 1]["F"]["mean"] == pytest.approx(f[number])
    assert 20 < j[2] < 90 and 20 < f[1] < 90


def test_statistics_by_hand():
    values = np.array([0.9, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.1])  # quarters end at frames 0 2 4 6 8, shared
    assert davis.statistics(values) == pytest.approx(
        {"mean": 4.5 / 9, "recall": 4 / 9, "decay": (0.9 + 0.9 + 0.8) / 3 - (0.2 + 0.1 + 0.1) / 3}
    )


def test_video_drops_the_ends_and_void_and_averages_over_objects():
    truth = np.zeros((5, 60, 60), np.uint8)
    truth[:, 5:25, 5:25], truth[:, 35:50, 30:50], truth[:, :3] = 1, 2, 255
    prediction = np.where(truth == 255, 0, truth)
    prediction[0], prediction[-1] = 0, 0  # do not count
    prediction[:, 35:50, 30:50] = 0  # object 2 is lost
    objects = davis.score_video(prediction, truth)
    table = davis.summarize(objects)
    assert [entry["J"]["mean"] for entry in objects] == [1, 0]
    assert table["J&F_mean"] == 50 and table["F_recall"] == 50 and table["J_decay"] == 0


def test_bad_videos_are_named():
    video = np.ones((4, 8, 8), np.uint8)
    with pytest.raises(UserError, match="bear: predictions"):
        davis.score_video(video[:3], video, "bear")
    with pytest.raises(UserError, match="bear: 2 annotated"):
        davis.score_video(video[:2], video[:2], "bear")
    with pytest.raises(UserError, match="no object"):
        davis.score_video(video, video * 0, "bear")
