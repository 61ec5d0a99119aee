# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every kind, damaged: each is read, or refused by a UserError, in bounded time and memory."""

import io
import json
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.gguf import import_gguf
from nemo_aligner.checkpoint.huggingface import import_huggingface
from nemo_aligner.checkpoint.legacy import import_legacy
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.tokenizer_files import load_archived_tokenizer
from nemo_aligner.checkpoint.torch_dist import check_folder
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer
from nemo_aligner.models.gpt.config import GPTConfig
from tests.fuzz.guard import run
from tests.fuzz.mutate import bend, spell, spoil_file, twist
from tests.unit.checkpoint.conftest import CONFIGS, build, build_tokenizer, sentencepiece_model
from tests.unit.checkpoint.test_gguf import write_gguf

__all__ = ["sentencepiece_model"]  # a fixture of the readers' own tests

Target = Callable[[random.Random, Path], Callable[[], object]]
SIZES = {"max_shard_size": "30KB"}  # several files and an index


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("samples")
    for name in ("smollm2", "qwen3"):
        build(name).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    build("llama3").save_pretrained(root / "sharded", **SIZES)
    build("llama3").save_pretrained(root / "bin")
    torch.save(build("llama3").state_dict(), root / "bin/pytorch_model.bin")
    (root / "bin/model.safetensors").unlink()
    write_gguf(root / "smollm2", root / "model.gguf")
    import_from_huggingface(root / "smollm2", f"{root}/nemo/")
    import_from_huggingface(root / "smollm2", f"{root}/model.nemo")
    shutil.copytree(root / "nemo", root / "legacy")
    _make_legacy(root / "legacy")
    shutil.copytree(sentencepiece_model.parent, root / "spm")
    return root


def _make_legacy(folder: Path) -> None:
    reader = WeightReader(folder / "model_weights")
    torch.save({name: reader.read(name) for name in list(reader.shapes)}, folder / "model_weights.ckpt")
    shutil.rmtree(folder / "model_weights")


def _spoil(draw: random.Random, path: Path, change: Callable[[random.Random, bytes], bytes]) -> None:
    content = change(draw, path.read_bytes())
    path.unlink()  # it may be a hard link to the sample
    path.write_bytes(content)


def _copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy", copy_function=_link))


def _link(source: str, target: str) -> str:
    Path(target).hardlink_to(source)
    return target


def _import(folder: Path) -> Callable[[], object]:
    def read() -> None:
        model = import_huggingface(folder)
        GPTConfig.from_dict(model.config)
        for _ in model.weights:
            pass

    return read


def _hf_config(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        copy = _copy(samples / draw.choice(("smollm2", "qwen3")), folder)
        if draw.random() < 0.3:
            (copy / "config.json").unlink()
            (copy / "config.json").write_text(CONFIGS[draw.choice(list(CONFIGS))]().to_json_string())
        name = draw.choice(("config.json", "config.json", "config.json", "generation_config.json"))
        _spoil(draw, copy / name, spoil_file)
        for other in ("tokenizer.json", "tokenizer_config.json"):
            (copy / other).unlink()
        return _import(copy)

    return make


def _safetensors(samples: Path) -> Target:
    def spoil(draw: random.Random, data: bytes) -> bytes:
        if draw.random() < 0.5:
            return bend(draw, data)
        size = int.from_bytes(data[:8], "little")
        header = spell(draw, twist(draw, json.loads(data[8 : 8 + size])))
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        copy = _copy(samples / "sharded", folder)
        kind = draw.choice(("shard", "shard", "index", "swap"))
        shards = sorted(copy.glob("*.safetensors"))
        match kind:
            case "shard":
                _spoil(draw, draw.choice(shards), spoil)
            case "index":
                _spoil(draw, copy / "model.safetensors.index.json", spoil_file)
            case _:
                first, second = draw.sample(shards, 2)
                content = first.read_bytes()
                second.unlink()
                second.write_bytes(content)
        return _import(copy)

    return make


def _pickled(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        copy = _copy(samples / "bin", folder)
        _spoil(draw, copy / "pytorch_model.bin", _bend_head)
        return _import(copy)

    return make


def _bend_head(draw: random.Random, data: bytes) -> bytes:
    """Most damage where the structure is: near the start, or near the end."""
    match draw.randrange(3):
        case 0:
            size = draw.choice((64, 1000, 8000))
            return bend(draw, data[:size]) + data[size:]
        case 1:
            size = draw.choice((64, 1000, 8000))
            return data[:-size] + bend(draw, data[-size:])
    return bend(draw, data)


def _tokenizer(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        if draw.random() < 0.2:
            path = _copy(samples / "spm", folder) / "tokenizer.model"
            _spoil(draw, path, _bend_head)
            return lambda: _use(load_tokenizer("sentencepiece", path))
        copy = _copy(samples / "smollm2", folder)
        files = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        name = draw.choice(files)
        _spoil(draw, copy / name, bend if name.endswith("jinja") else spoil_file)
        return _import(copy) if draw.random() < 0.3 else lambda: _use(load_tokenizer("huggingface", copy))

    return make


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two 日本 </s>")
    tokenizer.decode([*ids, tokenizer.vocab_size - 1])
    if tokenizer.chat_template is not None:
        tokenizer.render_chat([{"role": "user", "content": "one"}], add_generation_prompt=True)


def _gguf(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        path = folder / "model.gguf"
        path.write_bytes(_bend_head(draw, (samples / "model.gguf").read_bytes()))

        def read() -> None:
            model = import_gguf(path)
            GPTConfig.from_dict(model.config)
            for _ in model.weights:
                pass

        return read

    return make


def _torch_dist(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        copy = _copy(samples / "nemo/model_weights", folder)
        match draw.choice(
            (".metadata", ".metadata", "structure", "structure", "__0_0.distcp", "common.pt", "json")
        ):
            case "structure":
                _spoil(draw, copy / ".metadata", _twist_metadata)
            case "json":
                _spoil(draw, copy / "metadata.json", spoil_file)
            case name:
                _spoil(draw, copy / name, _bend_head)

        def read() -> None:
            check_folder(copy)
            reader = WeightReader(copy)
            for name in list(reader.shapes):
                reader.read(name)

        return read

    return make


def _twist_metadata(draw: random.Random, data: bytes) -> bytes:
    metadata: Metadata = pickle.loads(data)
    numbers: Any = (0, -1, 1, 7, 2**31, 2**45, 2**62, -(2**40), 1.5, "1", None)
    key = draw.choice(
        [k for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)]
    )
    entry: Any = metadata.state_dict_metadata[key]
    index = draw.choice(list(metadata.storage_data))
    match draw.randrange(9):
        case 0:
            size = list(entry.size)
            size[draw.randrange(len(size))] = draw.choice(numbers)
            entry.size = tuple(size) if draw.random() < 0.5 else size
        case 1:
            chunk = draw.choice(entry.chunks)
            sizes = list(chunk.sizes)
            sizes[draw.randrange(len(sizes))] = draw.choice(numbers)
            chunk.sizes = tuple(sizes)
        case 2:
            chunk = draw.choice(entry.chunks)
            chunk.offsets = tuple(draw.choice(numbers) for _ in chunk.offsets)
        case 3:
            entry.properties.dtype = draw.choice((torch.int8, torch.complex128, torch.bfloat16, None, "x"))
        case 4:
            info = metadata.storage_data[index]
            metadata.storage_data[index] = replace(
                info, **{draw.choice(("offset", "length")): draw.choice(numbers)}
            )
        case 5:
            info = metadata.storage_data[index]
            bad: Any = draw.choice(("../x", "/etc/passwd", "", 7, None, "common.pt"))
            metadata.storage_data[index] = replace(info, relative_path=bad)
        case 6:
            entry.chunks = draw.choice(([], entry.chunks * 2, None, [None], entry.chunks[:1]))
        case 7:
            other: Any = draw.choice((None, 7, "x", entry.chunks, metadata))
            metadata.state_dict_metadata[draw.choice((key, "model.x", ""))] = other
        case _:
            metadata.storage_data[index] = draw.choice((None, 7, ("a", 0, 1)))  # type: ignore[assignment]
    return pickle.dumps(metadata)


def _model_config(samples: Path) -> Target:
    def spoil(draw: random.Random, data: bytes) -> bytes:
        if draw.random() < 0.7:
            return spell(draw, twist(draw, yaml.safe_load(data)), indent=draw.choice((None, 2)))
        return bend(draw, data)

    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        kind = draw.choice(("nemo", "nemo", "legacy"))
        copy = _copy(samples / kind, folder)
        _spoil(draw, copy / "model_config.yaml", spoil)

        def read() -> None:
            with open_nemo(copy, old_layouts=kind == "legacy") as archive:
                if kind == "legacy":
                    model = import_legacy(archive)
                    GPTConfig.from_dict(model.config)
                    for _ in model.weights:
                        pass
                    return
                GPTConfig.from_dict(archive.config)
                load_archived_tokenizer(archive)
            export_to_huggingface(copy, folder / "out")

        return read

    return make


def _nemo(samples: Path) -> Target:
    def make(draw: random.Random, folder: Path) -> Callable[[], object]:
        path = folder / "x.nemo"
        data = (samples / "model.nemo").read_bytes()
        path.write_bytes(_add_member(draw, data) if draw.random() < 0.4 else _bend_head(draw, data))

        def read() -> None:
            with open_nemo(path) as archive:
                reader = WeightReader(archive.weights)
                for name in list(reader.shapes):
                    reader.read(name)

        return read

    return make


def _add_member(draw: random.Random, data: bytes) -> bytes:
    stream = io.BytesIO(data)
    with tarfile.open(fileobj=stream, mode="a") as tar:
        name = draw.choice(
            ("../x", "/x", "a/b/c", "model_config.yaml", "model_weights", "x" * 300, "é\udc80", "")
        )
        info = tarfile.TarInfo(name)
        info.type = draw.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
                                 tarfile.CHRTYPE, b"z"))  # fmt: skip
        info.linkname = draw.choice(("", "x", "../../etc/passwd", "model_config.yaml", name))
        info.size = 5 if info.type == tarfile.REGTYPE else 0
        info.mode = draw.choice((0o644, 0, 0o4777))
        tar.addfile(info, io.BytesIO(b"hello"))
    return stream.getvalue()


TARGETS: dict[str, tuple[Callable[[Path], Target], int]] = {
    "config.json": (_hf_config, 200),
    "safetensors": (_safetensors, 150),
    "pytorch_model.bin": (_pickled, 60),
    "tokenizer": (_tokenizer, 60),
    "gguf": (_gguf, 120),
    "torch_dist": (_torch_dist, 200),
    "model_config.yaml": (_model_config, 150),
    "nemo": (_nemo, 60),
}


def _check(samples: Path, name: str, start: int, stop: int) -> None:
    make, _ = TARGETS[name]
    ends = run(make(samples), [f"{name} {seed}" for seed in range(start, stop)])
    assert ends["read"] > 0
    assert ends["refused"] > 0.1 * (stop - start)


@pytest.mark.parametrize("name", TARGETS)
def test_checkpoints(samples: Path, name: str):
    _check(samples, name, 0, TARGETS[name][1])


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(1, 10))
@pytest.mark.parametrize("name", TARGETS)
def test_many_checkpoints(samples: Path, name: str, part: int):
    _check(samples, name, part * TARGETS[name][1], (part + 1) * TARGETS[name][1])
