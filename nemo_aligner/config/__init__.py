# SPDX-License-Identifier: Apache-2.0
"""The settings of each script: a Job composes the blocks that the layers own. Imports no torch."""
