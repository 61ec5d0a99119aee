# SPDX-License-Identifier: Apache-2.0
"""How scripts start: Hydra, ranks, signals, and errors reported to people."""
