# SPDX-License-Identifier: Apache-2.0
"""One table per model family: how its config keys and weights correspond to ours."""
