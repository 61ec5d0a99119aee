# SPDX-License-Identifier: Apache-2.0
"""A critic or reward model in one job, queried and trained by another over PyTriton."""
