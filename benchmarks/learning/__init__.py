# SPDX-License-Identifier: Apache-2.0
"""What models learn, over seeds: docs/results.md and the curves of the algorithms' pages."""
