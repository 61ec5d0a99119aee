# SPDX-License-Identifier: Apache-2.0
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.serving.address import job_name, listening_host, resolve
from nemo_aligner.serving.token import find_token

STEP = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}


def test_on_this_machine_there_is_none_unless_the_variable_is_set(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert find_token("127.0.0.1", 5556, environ) is None
    assert find_token("127.0.0.1", 5556, environ | {"NEMO_ALIGNER_TOKEN": ""}) is None
    token = find_token("127.0.0.1", 5556, environ | {"NEMO_ALIGNER_TOKEN": "abc"})
    assert token is not None
    assert (token.text, token.origin) == ("abc", "NEMO_ALIGNER_TOKEN")
    assert "abc" not in repr(token)
    assert not list(tmp_path.iterdir())


def test_elsewhere_whoever_comes_first_makes_it_for_all(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    with ThreadPoolExecutor(16) as pool:
        tokens = list(pool.map(lambda _: find_token("10.0.0.1", 5556, environ), range(64)))
    texts = {token.text for token in tokens if token is not None}
    assert len(texts) == 1
    assert len(texts.pop()) >= 32
    path = tmp_path / ".nemo_aligner/7-5556.token"
    assert [*path.parent.iterdir()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    other = find_token("10.0.0.1", 5557, environ)
    assert other is not None
    assert other.path != path
    other.remove()
    other.remove()
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ".nemo_aligner/local-5556.token"
    path.parent.mkdir()
    path.write_text("abc")
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"local-5556.token can be read by others \(mode 0644\)"):
        find_token("10.0.0.1", 5556, {"HOME": str(tmp_path)})


@pytest.mark.parametrize("text", ["a b", "a,b", "a=b", "a:b", "é", "a\n"])
def test_a_token_that_no_header_carries_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="NEMO_ALIGNER_TOKEN"):
        find_token("127.0.0.1", 5556, {"NEMO_ALIGNER_TOKEN": text})


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "127.0.0.1"),
        (STEP | {"SLURM_JOB_NUM_NODES": "1"}, "127.0.0.1"),
        (STEP | {"SLURM_JOB_NUM_NODES": "2"}, "n1"),
        (STEP | {"SLURM_NNODES": "8"}, "n1"),
        (STEP | {"SLURM_JOB_NUM_NODES": "1", "SLURM_HET_SIZE": "2"}, "n1"),
        (STEP | {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n2"}, "n1"),
    ],
)
def test_where_to_listen_follows_from_the_environment(environ: dict[str, str], host: str) -> None:
    assert listening_host(environ) == host


def test_a_node_without_a_name_is_reported() -> None:
    with pytest.raises(UserError, match="SLURMD_NODENAME"):
        listening_host({"SLURM_JOB_NUM_NODES": "2"})


def test_both_groups_of_a_heterogeneous_job_have_its_leaders_name() -> None:
    assert job_name({"SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"}) == "7"
    assert job_name({"SLURM_JOB_ID": "7"}) == "7"
    assert job_name({}) == "local"


def test_an_unknown_host_is_reported_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(UserError, match=r"remote_critic_rm\.critic\.ip=nowhere"):
        resolve("nowhere", setting="remote_critic_rm.critic.ip")
