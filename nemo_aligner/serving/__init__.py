# SPDX-License-Identifier: Apache-2.0
"""A critic or reward model in one job, asked and taught by another over PyTriton."""
