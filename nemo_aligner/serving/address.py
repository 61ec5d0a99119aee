# SPDX-License-Identifier: Apache-2.0
"""Where a server listens: on this machine alone, unless a setting says otherwise or its job has several nodes."""

import socket
from collections.abc import Mapping

from nemo_aligner.errors import UserError

LOCAL = "127.0.0.1"
# In seconds, seconds and times: a machine that is gone is missed after 90 s.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


def listening_host(environ: Mapping[str, str]) -> str:
    """Where to listen when no setting says: 127.0.0.1, or under a Slurm job of several nodes the name of this node.

    Raises:
        UserError: Slurm does not report the node's name.

    >>> listening_host({"SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"})
    '127.0.0.1'
    >>> listening_host({"SLURM_JOB_NUM_NODES": "1", "SLURM_HET_SIZE": "2", "SLURMD_NODENAME": "n1"})
    'n1'
    """
    counts = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_HET_SIZE")
    several = any(int(environ.get(name) or 1) > 1 for name in counts)
    # Steps of a heterogeneous job may lack its size, but know the nodes of each group.
    if not several and "SLURM_JOB_NODELIST_HET_GROUP_1" not in environ:
        return LOCAL
    if name := environ.get("SLURMD_NODENAME"):
        return name
    raise UserError(
        "this is a Slurm job of several nodes, but SLURMD_NODENAME is not set, so the node's address is not known",
        fix="start the server with srun, or set the address to listen on",
    )


def resolve(host: str, *, setting: str) -> str:
    """The IPv4 address of a host.

    Raises:
        UserError: the name is not known here; ``setting`` says where it came from.

    >>> resolve("localhost", setting="remote_critic_rm.critic.ip")
    '127.0.0.1'
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(
            f"{setting}={host} cannot be resolved: {error}",
            fix=f"set {setting} to a host name or an IPv4 address",
        ) from None


def keep_alive(connection: socket.socket) -> None:
    """Have the other side's machine missed when it is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def job_name(environ: Mapping[str, str]) -> str:
    """A name that both jobs of a run know: the id of their Slurm job, or of its leader where it is heterogeneous."""
    names = ("SLURM_JOB_ID_HET_GROUP_0", "SLURM_HET_JOB_ID", "SLURM_JOB_ID")
    return next((environ[name] for name in names if environ.get(name)), "local")
