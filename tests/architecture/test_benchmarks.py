# SPDX-License-Identifier: Apache-2.0
"""The page of benchmarks is what its JSON gives, and the peers' scripts are as they were taken."""

import hashlib
from pathlib import Path

from benchmarks.figures import load, page
from benchmarks.run import PAGE, PARTS, RESULTS

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks/peers"


def test_the_page_says_what_the_json_holds():
    parts = load(RESULTS)
    assert set(parts) <= set(PARTS)
    # Where nothing was measured there is no page.
    assert PAGE.exists() == bool(parts)
    assert not parts or PAGE.read_text() == page(parts, PARTS)


def test_the_peers_are_unchanged():
    sums = dict(
        reversed(line.split()) for line in (ROOT / "benchmarks/peers.sha256").read_text().splitlines()
    )
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in PEERS.iterdir() if path.is_file()
    }
    assert found == sums
