"""Batches: the same whatever the devices and the order of asking, in the shares asked for."""

import collections
import pathlib

import jax
import numpy as np
import pytest

from solar_jax.config import DataConfig
from solar_jax.data.pipeline import Corpus, heldout_batches, heldout_rows, load_corpus, training_batch, training_rows
from solar_jax.errors import UserError
from solar_jax.parallel.rules import batch_sharding
from solar_jax.training.step import mean_loss
from tests.conftest import byte_tokenizer
from tests.parallel.test_mesh import mesh_of

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1)]
EOS = 2
LENGTH = 16


def load(*sources: str, length: int = LENGTH) -> Corpus:
    cfg = DataConfig(sources=sources, sequence_length=length, holdout_every=8, packing="concat")
    return load_corpus(cfg, byte_tokenizer(), EOS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    """a.txt and b.txt of different letters, so that a row tells its source, and letters of random order."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, letters in (("a", "abcdef"), ("b", "uvwxyz"), ("c", "123456")):
        (folder / f"{name}.txt").write_text("".join(rng.choice(list(letters), 4000)))
    return folder


@pytest.fixture(scope="module")
def corpus(texts) -> Corpus:
    return load(f"{texts}/a.txt:3", f"{texts}/b.txt")


def values(batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in batch.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("shape", MESHES)
def test_the_global_batch_is_that_of_one_device(corpus, shape):
    rows, sharding = training_rows(corpus, 0), batch_sharding(mesh_of(*shape))
    batch = training_batch(rows, 40, 8, 8, sharding)
    # By hand: rows 40 to 47 of the mixture.
    expected = {name: np.stack([rows[i][name] for i in range(40, 48)]) for name in rows[0]}
    assert_equal(values(batch), expected)
    for x in batch.values():
        assert x.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_rows_added_for_the_devices_weigh_nothing_and_move_no_other(corpus, shape):
    rows = training_rows(corpus, 0)
    found = values(training_batch(rows, 30, 6, 8, batch_sharding(mesh_of(*shape))))
    expected = values(training_batch(rows, 30, 6, 6, batch_sharding(mesh_of(1, 1, 1))))
    assert_equal({name: x[:6] for name, x in found.items()}, expected)
    assert not found["weights"][6:].any()


def test_a_step_has_one_batch_whatever_was_asked_before(corpus):
    sharding = batch_sharding(mesh_of(1, 1, 1))
    rows = training_rows(corpus, 0)
    in_order = [values(training_batch(rows, 4 * step, 4, 4, sharding)) for step in range(6)]
    fresh = training_rows(corpus, 0)
    for step in (5, 0, 3, 3, 1):
        assert_equal(values(training_batch(fresh, 4 * step, 4, 4, sharding)), in_order[step])


def test_steps_follow_one_another_without_gap_or_overlap(corpus):
    rows, sharding = training_rows(corpus, 0), batch_sharding(mesh_of(1, 1, 1))
    small = [values(training_batch(rows, 4 * step, 4, 4, sharding))["tokens"] for step in range(4)]
    large = [values(training_batch(rows, 8 * step, 8, 8, sharding))["tokens"] for step in range(2)]
    np.testing.assert_array_equal(np.concatenate(small), np.concatenate(large))


def test_another_seed_gives_another_order(corpus):
    sharding = batch_sharding(mesh_of(1, 1, 1))
    first, second = (values(training_batch(training_rows(corpus, s), 0, 8, 8, sharding))["tokens"] for s in (0, 1))
    assert (first != second).any()


def test_every_pass_shows_every_row_once_in_another_order(texts):
    corpus = load(f"{texts}/a.txt")
    packed = corpus.train[0][1]
    rows, n = training_rows(corpus, 0), len(packed)
    expected = sorted(packed[i]["tokens"].tobytes() for i in range(n))
    first, second = ([rows[k * n + i]["tokens"].tobytes() for i in range(n)] for k in (0, 1))
    assert sorted(first) == expected
    assert sorted(second) == expected
    assert first != [packed[i]["tokens"].tobytes() for i in range(n)]
    assert first != second


def test_a_mixture_keeps_its_weights(texts):
    rows = training_rows(load(f"{texts}/a.txt:3", f"{texts}/b.txt", f"{texts}/c.txt:.5"), 0)
    letter = {byte_tokenizer().token_to_id(c): c for c in "abcdefuvwxyz123456"}
    kinds = {c: name for name, letters in (("a", "abcdef"), ("b", "uvwxyz"), ("c", "123456")) for c in letters}
    found = collections.Counter(kinds[letter[int(rows[i]["tokens"][3])]] for i in range(2000))
    shares = {"a": 3 / 4.5, "b": 1 / 4.5, "c": 0.5 / 4.5}
    assert set(found) == set(shares)
    for name, share in shares.items():
        assert abs(found[name] / 2000 - share) < 0.02


def test_training_and_heldout_text_do_not_overlap(texts):
    corpus = load(f"{texts}/a.txt")
    whole = (texts / "a.txt").read_text()
    tokenizer = byte_tokenizer()
    (_, train), (_, heldout) = corpus.train[0], corpus.heldout[0]
    assert tokenizer.decode(train.stream.tolist()) == whole[:3500]
    assert tokenizer.decode(heldout.stream.tolist()) == whole[3500:]


@pytest.mark.parametrize(("rows", "size"), [(13, 8), (8, 8), (3, 8), (13, 1)])
def test_filling_up_the_last_heldout_batch_leaves_the_mean_loss_alone(corpus, rows, size):
    kept = heldout_rows(corpus, 40)[:rows]
    batches = heldout_batches(kept, size, batch_sharding(mesh_of(1, 1, 1)))
    assert len(batches) == -(-rows // size)
    assert {x.shape for batch in batches for x in batch.values()} == {(size, LENGTH)}

    def summed(params, batch):  # a loss that depends on every token
        del params
        return (batch["weights"] * (batch["targets"] + 0.1 * batch["tokens"])).sum(), batch["weights"].sum()

    losses = [r["weights"] * (r["targets"] + 0.1 * r["tokens"]) for r in kept]
    expected = np.sum(losses) / np.sum([r["weights"] for r in kept])
    assert mean_loss(summed, {}, batches) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", MESHES)
def test_heldout_batches_are_the_same_on_every_mesh(corpus, shape):
    kept = heldout_rows(corpus, 12)
    found = heldout_batches(kept, 8, batch_sharding(mesh_of(*shape)))
    tokens = np.concatenate([np.asarray(b["tokens"]) for b in found])
    np.testing.assert_array_equal(tokens[:12], np.stack([r["tokens"] for r in kept]))


def test_heldout_rows_are_the_first_of_each_source_by_weight(corpus):
    found = heldout_rows(corpus, 40)
    (_, a), (_, b) = corpus.heldout
    assert [r["tokens"].tobytes() for r in found] == [
        *(a[i]["tokens"].tobytes() for i in range(30)),
        *(b[i]["tokens"].tobytes() for i in range(10)),
    ]


@pytest.mark.parametrize("windows", [40, 20, 3])
def test_heldout_rows_are_as_many_as_asked_for(texts, windows):
    # Shares that do not come out even: 40 / 3.
    corpus = load(*(f"{texts}/{name}.txt" for name in "abc"))
    assert len(heldout_rows(corpus, windows)) == windows


def test_fewer_heldout_rows_than_asked_for_are_all_taken(corpus):
    assert len(heldout_rows(corpus, 10_000)) == sum(len(rows) for _, rows in corpus.heldout)


@pytest.mark.parametrize(
    ("characters", "part", "tokens"), [(40, "training", 36), (200, "held-out", 26)], ids=["training", "held out"]
)
def test_a_source_too_small_for_one_row_is_refused_with_path_and_numbers(tmp_path, characters, part, tokens):
    # 7/8 of the characters train, 1/8 are held out, and each part ends with one more token.
    file = tmp_path / "small.txt"
    file.write_text("x" * characters)
    with pytest.raises(UserError) as e:
        load(str(file), length=48)
    for expected in (str(file), f"{tokens} {part} tokens", "config.data.sequence_length=48", "49"):
        assert expected in str(e.value)


def test_batches_are_read_by_the_device_that_holds_them(corpus):
    # Each device's part lies there already; a replicated batch would be as large as the whole on each.
    batch = training_batch(training_rows(corpus, 0), 0, 8, 8, batch_sharding(mesh_of(2, 2, 2)))
    for x in jax.tree.leaves(batch):
        assert {shard.data.shape for shard in x.addressable_shards} == {(2, LENGTH)}
