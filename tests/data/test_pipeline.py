"""Batches: the same whatever the devices and the order of asking, in the shares asked for."""

import collections
import contextlib
import json
import multiprocessing
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

from solar_jax.config import DataConfig
from solar_jax.data.corpus import Corpus, heldout_rows, load_corpus
from solar_jax.data.pipeline import (
    Feed,
    addresses,
    batch_documents,
    heldout_batches,
    passes,
    training_batch,
    training_rows,
)
from solar_jax.data.sources import documents, parse_sources
from solar_jax.errors import UserError
from solar_jax.parallel.rules import batch_sharding
from solar_jax.training.step import mean_loss
from tests.conftest import byte_tokenizer
from tests.parallel.test_mesh import mesh_of

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1)]
REPO = pathlib.Path(__file__).parents[2]
EOS = 2
LENGTH = 16


def load(*sources: str, length: int = LENGTH, packing: str = "concat") -> Corpus:
    cfg = DataConfig(sources=sources, sequence_length=length, holdout_every=8, packing=packing)
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


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> list[str]:
    """Sources of documents of different lengths: 9 tokens fill a row of 16 badly, 16 fully, 2 to 40 almost."""
    folder, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for name, letters, sizes in (
        ("a", "abcdef", [9] * 2000), ("b", "uvwxyz", [16] * 2000), ("c", "123456", rng.integers(2, 40, 2000)),
    ):  # fmt: skip
        lines = [json.dumps({"text": "".join(rng.choice(list(letters), n))}) for n in sizes]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [f"{folder}/a.jsonl:3", f"{folder}/b.jsonl:1.009", f"{folder}/c.jsonl:.5"]


def token_shares(corpus: Corpus, rows: int) -> np.ndarray:
    """The share of each source among the real tokens of the mixture's first rows."""
    counts = np.zeros(len(corpus.train))
    places = addresses(corpus, 0)
    for i in range(rows):
        source, row = places[i]
        counts[source] += corpus.train[source][1][row]["weights"].sum()
    return counts / counts.sum()


def test_a_mixture_has_the_shares_of_tokens_that_are_asked_for(uneven):
    corpus = load(*uneven, packing="best_fit")
    asked = np.array([3, 1.009, 0.5]) / 4.509
    found = token_shares(corpus, 10_000)
    assert np.abs(found / asked - 1).max() < 0.005
    fill = [rows.tokens / len(rows) for _, rows in corpus.train]
    assert fill[:2] == [9.0, 16.0]
    of_rows = asked * fill / (asked * fill).sum()  # what shares of rows would have given
    assert np.abs(of_rows / asked - 1).max() > 0.1


def test_a_mixture_that_is_resumed_goes_on_as_it_was_whatever_the_new_batch_size(uneven):
    corpus, sharding = load(*uneven, packing="best_fit"), batch_sharding(mesh_of(1, 1, 1))
    whole = Feed(training_rows(corpus, 0), 0, 4, 4, sharding)
    expected = np.concatenate([values(whole(k))["tokens"] for k in range(12)])
    first = Feed(training_rows(load(*uneven, packing="best_fit"), 0), 0, 4, 4, sharding)
    found = [values(first(k))["tokens"] for k in range(4)]
    second = Feed(training_rows(load(*uneven, packing="best_fit"), 0), 16, 8, 8, sharding)
    found += [values(second(k))["tokens"] for k in range(4)]
    np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.slow  # new processes import for seconds
@pytest.mark.parametrize(("workers", "shape"), [(1, (1, 1, 1)), (3, (2, 2, 2))])
def test_worker_processes_make_the_same_batches_and_end(uneven, workers, shape):
    flags.FLAGS.mark_as_parsed()  # as a command's start does; grain reads flags of its own
    rows, sharding = training_rows(load(*uneven, packing="best_fit"), 0), batch_sharding(mesh_of(*shape))
    here, there = Feed(rows, 7, 6, 8, sharding), Feed(rows, 7, 6, 8, sharding, workers)
    with contextlib.closing(there):
        for k in range(8):
            assert_equal(values(there(k)), values(here(k)))
        assert len(multiprocessing.active_children()) == workers
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, os, signal, sys
from absl import flags
flags.FLAGS.mark_as_parsed()
import jax
from solar_jax.data.pipeline import Feed, training_rows
from tests.data.test_pipeline import load
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
feed = Feed(training_rows(load(sys.argv[1]), 0), 0, 4, 4, sharding, 2)
feed(0), feed(1)  # one from each
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # new processes import for seconds
def test_worker_processes_end_with_a_run_that_is_killed(uneven):
    # Otherwise each kill would leave some that wait for ever.
    command = [sys.executable, "-c", KILLED, uneven[0]]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    workers = [pathlib.Path("/proc", pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    for _ in range(200):
        if not any(worker.exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {workers}")


def test_the_documents_of_a_batch_are_those_of_its_rows(uneven):
    corpus = load(*uneven, packing="best_fit")
    texts = {d.id: d.text for entry in uneven for d in documents(parse_sources((entry,))[0])}
    found = batch_documents(corpus, 0, 5, 3)
    assert len(found) == len(set(found)) > 2
    tokenizer, rows = byte_tokenizer(), training_rows(corpus, 0)
    shown = "".join(tokenizer.decode(rows[i]["tokens"].tolist()) for i in range(5, 8))
    assert all(texts[name][:LENGTH] in shown or texts[name][LENGTH : 2 * LENGTH] in shown for name in found)


def test_without_a_bound_of_its_own_a_source_is_read_four_times_at_most_but_a_begun_run_goes_on(texts):
    corpus = load(f"{texts}/a.txt")
    rows = len(corpus.train[0][1])
    assert passes(corpus, 4 * rows) == [4.0]
    with pytest.raises(UserError, match=r"may be read 4 times, .*or allow more \(.*a.txt\?epochs=N\), add text"):
        passes(corpus, 5 * rows)
    assert passes(corpus, 5 * rows, resumes=True) == [5.0]
    assert passes(load(f"{texts}/a.txt?epochs=9"), 5 * rows) == [5.0]


def test_a_run_says_how_often_it_reads_each_source_and_refuses_more_than_its_epochs(texts):
    # 3 : 1 over sources of the same size: of 1000 rows 750 and 250.
    corpus = load(f"{texts}/a.txt?epochs=4:3", f"{texts}/b.txt")
    rows = len(corpus.train[0][1])
    assert passes(corpus, 1000) == pytest.approx([750 / rows, 250 / rows], abs=1 / rows)
    seen = collections.Counter(addresses(corpus, 0)[i][0] for i in range(1000))
    assert passes(corpus, 1000) == [seen[0] / rows, seen[1] / rows]
    passes(corpus, 4 * rows)
    with pytest.raises(UserError) as e:
        passes(corpus, 6 * rows)
    for expected in (f"{texts}/a.txt has {rows} rows", "may be read 4 times", "4.50 times"):
        assert expected in str(e.value)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("limit", [200, 2000])
def test_no_more_training_tokens_are_used_of_a_source_than_its_limit(uneven, packing, limit):
    path = uneven[2].split(":")[0]
    whole, cut = load(path, packing=packing), load(f"{path}?limit={limit}", packing=packing)
    stream = cut.train[0][1].stream
    assert len(stream) == limit
    assert stream[:-1].tolist() == whole.train[0][1].stream[: limit - 1].tolist()
    assert len(cut.heldout[0][1].stream) == limit // 7


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
        loss = (batch["weights"] * (batch["targets"] + 0.1 * batch["tokens"])).sum()
        return {"loss": (loss, batch["weights"].sum())}

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
