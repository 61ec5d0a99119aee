# SPDX-License-Identifier: Apache-2.0
"""Archives: written whole or not at all, and nothing in one reaches outside its folder."""

import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.checkpoint.nemo_archive import open_nemo, write_nemo
from nemo_aligner.checkpoint.weights import WeightReader, save_weights
from nemo_aligner.errors import UserError

NAME = "embedding.word_embeddings.weight"
CONFIG = {
    "num_layers": 0,
    "layernorm_epsilon": 1e-5,
    "rope_scaling": None,
    "text": "ü: {{ x }}\n",
    "list": [1, 2.5],
}


def save(folder: Path) -> None:
    save_weights(folder, [(NAME, torch.arange(6.0).reshape(2, 3))], 0)


def write(path: Path | str, **options: Any) -> None:
    write_nemo(path, config=CONFIG, files={"tokenizer/a.json": b"{}"}, weights=save, **options)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where extracted archives go during this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("name", ["x.nemo", "x/"])
def test_written_and_opened(tmp_path: Path, temporary: Path, name: str):
    write(f"{tmp_path}/{name}")
    with open_nemo(tmp_path / name) as archive:
        assert archive.config == CONFIG
        assert archive.file("nemo:tokenizer/a.json").read_text() == "{}"
        assert torch.equal(WeightReader(archive.weights).read(NAME), torch.arange(6.0).reshape(2, 3))
        assert archive.folder.parent == (temporary if name == "x.nemo" else tmp_path)
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary", name.strip("/")]


def test_a_plain_tar_of_the_folder_is_a_nemo(tmp_path: Path):
    """As NeMo and users' tar command write it: members named ./x, compressed or not."""
    write(f"{tmp_path}/x/")
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "x.nemo", mode) as tar:
            tar.add(tmp_path / "x", arcname=".")
        with open_nemo(tmp_path / "x.nemo") as archive:
            assert list(WeightReader(archive.weights).shapes) == [NAME]


def test_the_temporary_folder_goes_when_the_work_fails(tmp_path: Path, temporary: Path):
    write(tmp_path / "x.nemo")
    with pytest.raises(KeyboardInterrupt), open_nemo(tmp_path / "x.nemo"):
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path):
    write(tmp_path / "x.nemo")
    before = (tmp_path / "x.nemo").read_bytes()

    def fail(folder: Path) -> None:
        save(folder)
        raise KeyboardInterrupt

    for path in (tmp_path / "x.nemo", f"{tmp_path}/y/"):
        with pytest.raises(KeyboardInterrupt):
            write_nemo(path, config={}, files={}, weights=fail, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]
    assert (tmp_path / "x.nemo").read_bytes() == before


@pytest.mark.parametrize("name", ["x.nemo", "x/"])
def test_overwriting_needs_to_be_asked_for(tmp_path: Path, name: str):
    path = f"{tmp_path}/{name}"
    write(path)
    with pytest.raises(UserError, match="exists"):
        write(path)
    write_nemo(path, config={"new": 1}, files={}, weights=save, overwrite=True)
    with open_nemo(path) as archive:
        assert archive.config == {"new": 1}
        assert not (archive.folder / "tokenizer").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name.strip("/")]


def test_a_folder_that_is_no_nemo_is_never_replaced(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="not an extracted"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../evil"), r"'\.\./evil'"),
        (member("a/../../evil"), r"'a/\.\./\.\./evil'"),
        (member("/tmp/evil"), "'/tmp/evil'.*absolute"),
        (member("x", tarfile.SYMTYPE, "/etc/passwd"), "'x'"),
        (member("x", tarfile.SYMTYPE, "../../etc/passwd"), "'x'"),
        (member("x", tarfile.LNKTYPE, "../evil"), "'x'"),
        (member("x", tarfile.SYMTYPE, "nothing"), "'x' links to nothing"),
        (member("x", tarfile.SYMTYPE, "x"), "'x' links to nothing"),
        (member("x", tarfile.SYMTYPE, "folder"), "'x' is not a file"),
        (member("x", tarfile.CHRTYPE), "'x'"),
        (member("x", tarfile.FIFOTYPE), "'x'"),
        (member("model_config.yaml/x"), "cannot be written"),
        (member("model_config.yaml"), "cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_hostile_members_are_refused(tmp_path: Path, temporary: Path, bad: tarfile.TarInfo, message: str):
    path = tar_of(
        tmp_path / "x.nemo",
        (member("model_config.yaml"), b"a: 1"),
        (member("folder", tarfile.DIRTYPE), b""),
        (bad, b""),
    )
    with pytest.raises(UserError, match=message) as caught, open_nemo(path):
        pass
    assert str(path) in str(caught.value)
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary", "x.nemo"]


def test_a_link_within_the_archive_becomes_a_file(tmp_path: Path):
    path = tar_of(
        tmp_path / "x.nemo",
        (member("model_config.yaml"), b"a: 1"),
        (member("hard", tarfile.LNKTYPE, "model_config.yaml"), b""),
        (member("sub/soft", tarfile.SYMTYPE, "../model_config.yaml"), b""),
    )
    with open_nemo(path, old_layouts=True) as archive:
        for name in ("hard", "sub/soft"):
            assert archive.file(name).read_text() == "a: 1"
            assert not archive.file(name).is_symlink()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_is_cut_anywhere_is_refused(tmp_path: Path, temporary: Path, mode: str):
    content = bytes(range(256)) * 8
    path = tar_of(
        tmp_path / "x.nemo", (member("model_config.yaml"), b"a: 1"), (member("b"), content), mode=mode
    )
    whole = path.read_bytes()
    end = 512 * 7 if mode == "w" else len(whole) // 2  # what follows is padding
    for size in [0, 1, *range(50, end, 111), *range(512, end, 512), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.nemo"), open_nemo(path, old_layouts=True):
            pass
    assert list(temporary.iterdir()) == []


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "x.nemo").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match="not a whole tar"), open_nemo(tmp_path / "x.nemo"):
        pass
    with pytest.raises(UserError, match="does not exist"), open_nemo(tmp_path / "y.nemo"):
        pass


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "x").touch(), r"no model_config\.yaml"),
        (lambda folder: (folder / "model_config.yaml").write_text("- a"), "not a mapping"),
        (lambda folder: (folder / "model_config.yaml").write_text("a: [1"), "not YAML"),
        (lambda folder: (folder / "model_config.yaml").write_text("a: " + "[" * 100_000), "not YAML"),
        (lambda folder: (folder / "model_config.yaml").write_text('a: "\\udc00"'), "not YAML"),
        (lambda folder: (folder / "model_config.yaml").write_text("a: 1"), "no weights"),
    ],
)
def test_folders_that_are_no_nemo_are_refused(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
):
    prepare(tmp_path)
    with pytest.raises(UserError, match=message), open_nemo(tmp_path):
        pass


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_weights.ckpt", "", r"old layout[\s\S]*convert_nemo_gpt_to_mcore\.py"),
        ("mp_rank_00/model_weights.ckpt", "", r"old layout[\s\S]*convert_nemo_gpt_to_mcore\.py"),
        ("tp_rank_00_pp_rank_000/model_weights.ckpt", "", "old layout"),
        ("model_weights/metadata.json", '{"sharded_backend": "zarr"}', r"zarr[\s\S]*torch_dist"),
    ],
)
def test_old_layouts_name_the_fix(tmp_path: Path, file: str, content: str, message: str):
    (tmp_path / "model_config.yaml").write_text("a: 1")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message), open_nemo(tmp_path):
        pass


def test_the_config_names_only_files_within(tmp_path: Path):
    write(f"{tmp_path}/x/")
    (tmp_path / "secret").write_text("")
    with open_nemo(tmp_path / "x") as archive:
        for name, message in (
            ("../secret", "outside"),
            ("/etc/passwd", "outside"),
            ("nothing", "holds no nothing"),
        ):
            with pytest.raises(UserError, match=message):
                archive.file(name)


def test_what_nemo_writes_into_its_configs_is_read(tmp_path: Path):
    """Scientific notation without a point, references within the file, and references that lead nowhere."""
    (tmp_path / "model_config.yaml").write_text(
        "layernorm_epsilon: 1e-05\nhidden_size: 8\nffn_hidden_size: ${hidden_size}\n"
        "precision: ${trainer.precision}\nsize: ${multiply:2,3}\noptim:\n  lr: ${.base}\n  base: 2\n"
    )
    with open_nemo(tmp_path, old_layouts=True) as archive:
        assert archive.config == {
            "layernorm_epsilon": 1e-5,
            "hidden_size": 8,
            "ffn_hidden_size": 8,
            "precision": "${trainer.precision}",
            "size": "${multiply:2,3}",
            "optim": {"lr": 2, "base": 2},
        }
