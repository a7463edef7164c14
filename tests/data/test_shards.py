"""Stored features: against a real S3 server on loopback, with interruptions, wrong secrets and missing buckets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLACES, ROOT, ROOT_TAG
from runs import run_script
from safetensors.torch import load_file

from efficient_asr.data import BatchOrder, load_row, read_manifest
from efficient_asr.data.shards import Place, Shards, _without_repetition, write_shards
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.training.run import run
from efficient_asr.training.whisper import WhisperBrain, features_meta
from efficient_asr.utils.errors import UserError

pytest.importorskip("datasets")
META = {"mels": 4, "window_samples": 320, "vocabulary": "x"}


def computed(row: dict) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(int(row["id"][1:]))
    features = torch.randn(4, 20, generator=generator)
    features[:, 12:] = features[:, 12:13]
    return features, [1, 2, int(row["id"][1:])]


def utterances(count: int) -> list[dict]:
    return [{"id": f"u{i}", "duration": 1.0 + i, "text": f"text {i}", "language": "en"} for i in range(count)]


def write(place: Place, count: int = 7, **options) -> dict[str, int]:
    from efficient_asr.data import Rows

    return write_shards(place, "train", Rows.of(utterances(count)), META, computed, **{"shard_size": 3} | options)


# ------------------------------------------------------------ shards


def test_what_is_read_is_what_was_computed(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    done = write(place)
    assert (done["shards"], done["kept"], done["utterances"]) == (3, 0, 7)
    shards = Shards(place, "train", tmp_path / "cache")
    assert [row["id"] for row in shards.rows] == [f"u{i}" for i in range(7)]
    for row in shards.rows:
        features, labels = computed(row)
        found = shards.read(row)
        assert torch.equal(found["features"], features) and found["labels"] == labels
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 3 and not list((tmp_path / "cache").glob("*.partial"))


def test_half_precision_takes_less_room_and_rounds_only(tmp_path: Path) -> None:
    whole, half = (Place(str(tmp_path / name)) for name in ("whole", "half"))
    assert write(half, dtype="float16")["bytes"] < write(whole)["bytes"]
    shards = Shards(half, "train", tmp_path / "cache")
    features, _ = computed(shards.rows[0])
    assert torch.equal(shards.read(shards.rows[0])["features"], features.half().float())


@pytest.mark.parametrize("frames", [1, 2, 20])
def test_repeated_columns_are_left_out_and_nothing_else(frames: int) -> None:
    features = torch.randn(4, frames)
    assert torch.equal(_without_repetition(features), features)
    repeated = torch.cat([features, features[:, -1:].expand(-1, 9)], dim=1)
    assert torch.equal(_without_repetition(repeated), features)
    constant = torch.ones(4, frames)
    assert _without_repetition(constant).shape[1] == 1


def test_other_programs_read_the_shards(tmp_path: Path) -> None:
    import datasets

    write(Place(str(tmp_path / "store")))
    files = sorted(map(str, (tmp_path / "store" / "train").glob("*.parquet")))
    found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = list(found)
    assert [row["id"] for row in rows] == [f"u{i}" for i in range(7)] and rows[3]["labels"] == [1, 2, 3]
    assert np.array(rows[3]["features"]).shape == (13, 4) and rows[3]["frames"] == 20


def test_an_interrupted_writing_is_resumed(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    write(place)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store" / "train").glob("*.parquet")}
    (tmp_path / "store" / "train" / "part-00001.json").unlink()
    (tmp_path / "store" / "train" / "index.json").unlink()
    (tmp_path / "store" / "train" / "part-00001.parquet").write_bytes(b"half of it")
    with pytest.raises(UserError, match="no complete split 'train'"):
        Shards(place, "train", tmp_path / "cache")
    assert write(place)["kept"] == 2
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store" / "train").glob("*.parquet")}
    (tmp_path / "store" / "train" / "part-00002.parquet").unlink()
    assert write(place)["kept"] == 2
    assert write(place, count=3)["shards"] == 1
    assert sorted(path.name for path in (tmp_path / "store" / "train").iterdir()) == [
        "index.json",
        "part-00000.json",
        "part-00000.parquet",
    ]
    assert write(place, count=7)["kept"] == 1
    assert write(place, count=8)["kept"] == 2  # the last shard has another utterance now
    assert write(place, count=8, dtype="float16")["kept"] == 0


def test_damage_is_found_and_the_cache_repaired(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    write(place)
    shards = Shards(place, "train", tmp_path / "cache")
    shards.read(shards.rows[0])
    (cached,) = (tmp_path / "cache").glob("*.parquet")
    cached.write_bytes(b"cut off")
    again = Shards(place, "train", tmp_path / "cache")
    assert torch.equal(again.read(again.rows[0])["features"], computed(again.rows[0])[0])
    stored = tmp_path / "store" / "train" / "part-00002.parquet"
    content = bytearray(stored.read_bytes())
    content[100] ^= 1
    stored.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"part-00002.parquet is damaged: its checksum differs"):
        again.read(again.rows[6])


def test_the_cache_stays_within_its_size(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    size = write(place, count=30)["bytes"]
    shards = Shards(place, "train", tmp_path / "cache", cache_gb=size / 1e9 / 3)
    for row in [*shards.rows, *shards.rows]:
        assert shards.read(row)["labels"][2] == int(row["id"][1:])
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*")) <= size / 3 + 1
    assert len(list((tmp_path / "cache").glob("*.parquet"))) < 5


def test_a_random_order_reads_every_file_once_in_a_pass() -> None:
    shards = np.repeat(np.arange(12), 5)
    order = BatchOrder(np.ones(60), "random", 4, seed=3, shards=shards)
    order.set_epoch(1)
    seen = [utterance for batch in order for utterance in batch]
    assert sorted(seen) == list(range(60)) and seen != sorted(seen)
    open_files: list[int] = []
    for place in range(0, 60, 20):  # four files at a time
        files = {*shards[seen[place : place + 20]].tolist()}
        assert len(files) == 4
        open_files += sorted(files)
    assert sorted(open_files) == list(range(12))
    first = list(order)
    order.set_epoch(2)
    assert list(order) != first


def test_credentials_do_not_belong_into_a_url() -> None:
    with pytest.raises(UserError, match="leave the credentials out") as error:
        Place("s3://key:secret@bucket/folder")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="this file system cannot be used"):
        Place("nowhere://bucket")


# ------------------------------------------------------------ an S3 server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on moto's server, which checks secrets."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        time.sleep(0.1)
        try:
            urllib.request.urlopen(url, timeout=1)
            break
        except OSError:
            continue
    patch = pytest.MonkeyPatch()
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "us", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        patch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="speech")
    yield "s3://speech"
    patch.undo()
    server.kill()
    server.wait()


@pytest.mark.slow
def test_features_go_to_s3_and_come_back(s3: str, tmp_path: Path) -> None:
    place = Place(f"{s3}/a/features")
    write(place)
    shards = Shards(place, "train", tmp_path / "cache")
    shards.read(shards.rows[0])
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 1  # nothing else was downloaded
    for row in shards.rows:
        assert torch.equal(shards.read(row)["features"], computed(row)[0])
    assert write(place)["kept"] == 3


@pytest.mark.slow
def test_a_bucket_that_is_not_there_and_a_wrong_secret_are_explained(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(
        UserError, match=r"s3://nobody/x: not found \(.*bucket does not exist\); check the name of the bucket"
    ):
        write(Place("s3://nobody/x"))

    def check_secrets_after(count: str) -> str:
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        request = urllib.request.Request(url, count.encode(), {"Content-Type": "text/plain"}, method="POST")
        answer = urllib.request.urlopen(request).read().decode()
        return answer.rpartition(":")[2].strip(' }"')

    before = check_secrets_after("0")
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong and private")
        with pytest.raises(
            UserError, match=r"s3://speech/b: access denied \(.*\); credentials: AWS_ACCESS_KEY_ID"
        ) as error:
            write(Place(f"{s3}/b"))
        assert "private" not in str(error.value)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        check_secrets_after(before)


@pytest.mark.slow
def test_a_killed_upload_is_resumed(s3: str, tmp_path: Path, mini_corpus: dict[str, Path]) -> None:
    out = f"{s3}/killed"
    command = [
        sys.executable, "scripts/prepare_features.py", "efficient_asr:mini_whisper_small", "--manifest", str(mini_corpus["test"]),
        "--split", "train", "--out", out, "--shard_size", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = Place(out)
    for _ in range(600):
        time.sleep(0.05)
        place.files.invalidate_cache()
        if place.files.exists(f"{place.root}/train/part-00002.json"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="no complete split"):
        Shards(place, "train", tmp_path / "cache")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(" were there")[0].rpartition("(")[2]) >= 3
    shards = Shards(place, "train", tmp_path / "cache")
    whisper = Whisper.from_source(str(ROOT / "efficient_asr" / "assets" / "mini_whisper_small"))
    rows = read_manifest(mini_corpus["test"])
    assert len(shards.rows) == len(rows) and shards.meta["vocabulary"] == features_meta(whisper)["vocabulary"]
    for row, stored in zip(list(rows)[:5], shards.rows, strict=False):
        wav = load_row(row)
        found = shards.read(stored)
        assert torch.equal(found["features"], whisper.features(wav[None], torch.tensor([len(wav)]))[0])
        assert found["labels"] == whisper.labels.encode_row(row)


# ------------------------------------------------------------ training

YAML = (
    PLACES
    + """
base: !include:{root}/hparams/_base/finetune_whisper.yaml
experiment: stored
source: {source}
language: en
lr: 0.003
warmup_steps: 1
number_of_epochs: 2
epoch_batches: 3
batch_size: 2
precision: fp32
tensorboard: False
speeds_percent: [100]
train_only: True
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_training_from_stored_features_is_training_from_audio(
    where: str, corpus: Path, tmp_path: Path, tiny_whispers: dict[str, str], request: pytest.FixtureRequest
) -> None:
    def train(name: str, *options: str) -> int:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x.yaml"
        path.write_text(YAML.format(root=ROOT_TAG, corpus=corpus, out=tmp_path / name, source=tiny_whispers["small"]))
        return run(WhisperBrain, [str(path), "--device", "cpu", *options])

    assert train("audio") == 0
    prepared = next((tmp_path / "audio").rglob("train.jsonl"))
    store = str(tmp_path / "store") if where == "folder" else f"{request.getfixturevalue('s3')}/training"
    for split in ("train", "dev"):
        manifest = prepared.with_name(f"{split}.jsonl")
        done = run_script(
            "scripts/prepare_features.py", tiny_whispers["small"], "--manifest", manifest, "--split", split, "--out", store,
            "--shard_size", "2", "--prepared_folder", tmp_path / "skipped",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    stored = ("--features_url", store, "--features_cache", str(tmp_path / "cache"))
    stored += () if where == "folder" else ("--num_workers", "2")  # each has a connection of its own
    assert train("stored", *stored) == 0
    a, b = (load_file(tmp_path / name / "output" / "model" / "model.safetensors") for name in ("audio", "stored"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    if where == "s3":
        return
    assert train("normalised", *stored, "--train_normaliser", "plain") == 2
    assert train("speeds", *stored, "--speeds_percent", "[90, 100]") == 2
    path = tmp_path / "store" / "train" / "index.json"
    index = json.loads((tmp_path / "store" / "train" / "index.json").read_text())
    index["meta"]["mels"] = 128
    path.write_text(json.dumps(index))
    assert train("other", *stored) == 2
