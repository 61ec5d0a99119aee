# SPDX-License-Identifier: Apache-2.0
"""The settings of each script: a job composes the blocks that the layers own. Imports no torch."""
